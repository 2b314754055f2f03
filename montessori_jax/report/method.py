"""What a run's settings say of its method: how tables call it, and which stages it goes through."""

from collections.abc import Iterator, Mapping
from typing import Any

# The stage whose scores rank a montessori run's candidates, by its signal.
SCORED_BY = {
    "influence": "influence",
    "judge": "judge",
    "training_loss": "losses",
    "random": "random",
}


def described(settings: Mapping[str, Any]) -> str:
    """The method with what sets it apart: ``montessori (signal: judge)``, plain where nothing does.

    Args:
        settings: the run's, flattened; what older runs lack has its default.
    """
    method = str(settings["method"])
    notes = list(_notes(method, settings))
    return f"{method} ({', '.join(notes)})" if notes else method


def _notes(method: str, settings: Mapping[str, Any]) -> Iterator[str]:
    signal, optimise = _ablated(settings)
    if method == "montessori":
        rule = settings.get("preferences.rule", "sign")
        if signal != "influence":
            yield f"signal: {signal}"
        elif rule != "sign":
            yield f"rule: {rule}"
        if optimise != "instruction":
            yield f"optimise: {optimise}"
    if settings.get("generator") == "url" and method != "no_finetuning":
        yield f"teacher: {settings.get('url.model')}"
    judged = method == "self_reward" or (method == "montessori" and signal == "judge")
    if judged and settings.get("judge.base_url"):
        yield f"judge: {settings.get('judge.model')}"


def tuning_stages(settings: Mapping[str, Any]) -> list[str]:
    """The stages that tune a teacher, in their order; none for methods that tune none."""
    signal, optimise = _ablated(settings)
    if settings["method"] == "self_reward":
        return ["generate", "respond", "judge", "preferences", "dpo"]
    if settings["method"] != "montessori":
        return []
    if optimise == "bootstrap":
        return ["generate", SCORED_BY[signal], "helpful", "bootstrap"]
    suffixes = {"response": ("-responses",), "both": ("", "-responses")}.get(optimise, ("",))
    responding = ["respond"] if "-responses" in suffixes else []
    ranked = [stage + end for stage in (SCORED_BY[signal], "preferences") for end in suffixes]
    return ["generate", *responding, *ranked, "dpo"]


def _ablated(settings: Mapping[str, Any]) -> tuple[str, str]:
    return settings.get("signal", "influence"), settings.get("optimise", "instruction")
