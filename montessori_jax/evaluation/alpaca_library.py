"""The `alpaca_eval` library: its judge prompts, parsers, win rate and length-controlled win rate.

The library's own client is not used: the questions go through `montessori_jax.serving.judge`, whose
journal keeps each judgement as it comes (the library saves a chunk of 128 at a time) and which
counts prompt and generated tokens by their own prices.
"""

import contextlib
import importlib.metadata
import logging
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from montessori_jax.errors import UserError
from montessori_jax.serving.judge import ABOUT_THE_QUESTION, Judgement, Question
from montessori_jax.serving.requests import Refused

DEFAULT = "weighted_alpaca_eval_gpt4_turbo"  # reads the log-probs of the judge's one token
WITHOUT_LOGPROBS = "mistral-large-2402_ranking"  # reads a ranking that the judge writes
# The parts of an annotator's request that any OpenAI-compatible address takes.
OPTIONS = ("max_tokens", "temperature", "top_p", "logprobs", "top_logprobs", "tools", "tool_choice")
CONTROL = ("<|im_start|>", "<|im_end|>")  # what the library's prompts are split into messages by

Ask = Callable[[Sequence[Question]], dict[str, Judgement]]


class NoLogprobs(Exception):
    """The annotator reads log-probs and the judge gives none with the first question."""


@cache
def library() -> Any:
    """The package `alpaca_eval`.

    Version 0.6.6 asks `pkg_resources` for two functions; setuptools has had no such module since
    81, so a stand-in is there while the library is imported. It also sets the root logger's level
    at import, which is set back.

    Raises:
        UserError: it is not installed.
    """
    from packaging.version import parse

    stand_in = types.ModuleType("pkg_resources")
    stand_in.__dict__.update(parse_version=parse, get_distribution=importlib.metadata.distribution)
    level, before = logging.getLogger().level, sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = stand_in
    try:
        import alpaca_eval.annotators
        import alpaca_eval.metrics.glm_winrate
    except ImportError as error:
        raise UserError(
            f"alpaca_eval needs a package that is not there ({error}): install montessori-jax[eval]"
        ) from None
    finally:
        logging.getLogger().setLevel(level)
        del sys.modules["pkg_resources"]
        if before is not None:
            sys.modules["pkg_resources"] = before
    return alpaca_eval


def annotator_config(name: str) -> dict[str, Any]:
    """An annotator that the library ships, with the path of its prompt made absolute.

    Raises:
        UserError: the library has none of this name.
    """
    folder = Path(library().constants.EVALUATORS_CONFIG_DIR)
    path = folder / name / "configs.yaml"
    if not path.is_file():
        known = sorted(place.parent.name for place in folder.glob("*/configs.yaml"))
        raise UserError(f"alpaca_eval has no annotator {name}; it has: {', '.join(known)}")
    (config,) = yaml.safe_load(path.read_text(encoding="utf-8")).values()
    return {**config, "prompt_template": str(folder / config["prompt_template"])}


def reads_logprobs(name: str) -> bool:
    """Whether an annotator cannot do without log-probs."""
    return bool(annotator_config(name)["completions_kwargs"].get("logprobs"))


def annotate(
    name: str,
    instructions: Sequence[str],
    baseline: Sequence[str],
    answers: Sequence[str],
    ask: Ask,
) -> list[float | None]:
    """What the judge prefers, by the library's annotator.

    Args:
        name: of the annotator.
        instructions: the prompts.
        baseline: the answers to beat.
        answers: the answers to judge.
        ask: gives the judgements of questions by their ids.

    Returns:
        One a prompt, from 1 (the baseline's answer) to 2 (the other); 1.5 for equal answers, about
        which no one is asked; None where the judgement could not be parsed, or is empty or, where
        they are read, without log-probs.

    Raises:
        NoLogprobs: see there.
    """
    package = library()
    config = annotator_config(name)
    asked = config["completions_kwargs"]
    options = {key: asked[key] for key in OPTIONS if key in asked}
    options.setdefault("max_tokens", asked.get("max_tokens_to_sample", 100))
    needs_logprobs = reads_logprobs(name)

    def completions(prompts: Sequence[str], **unused: Any) -> dict[str, list[Any]]:
        made = [
            Question(tuple(package.utils.prompt_to_chatml(prompt.strip())), options)
            for prompt in prompts
        ]
        if needs_logprobs:  # before the others are paid for
            _require_logprobs(ask, made[0])
        found = ask(made)
        texts = [found[one.id].text for one in made]
        whole = [{"text": found[one.id].text, "logprobs": found[one.id].logprobs} for one in made]
        counted = [0.0] * len(made)  # by the judge
        return {
            "completions": texts,
            "completions_all": whole,
            "price_per_example": counted,
            "time_per_example": counted,
        }

    def readable(completion: Any) -> bool:
        if isinstance(completion, dict):
            return bool(completion["logprobs" if needs_logprobs else "text"])
        return bool(completion)

    def side(texts: Sequence[str]) -> list[dict[str, str]]:
        pairs = zip(instructions, texts, strict=True)
        return [{"instruction": plain(asked), "output": plain(text)} for asked, text in pairs]

    with tempfile.TemporaryDirectory() as place, _quiet(package):
        path = Path(place) / "judge" / "configs.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump({"judge": {**config, "completions_kwargs": {}}}))
        annotator = package.annotators.PairwiseAnnotator(
            annotators_config=str(path), caching_path=None
        )
        judge = annotator.annotators["judge"]
        judge.fn_completions, parse = completions, judge.fn_completion_parser
        # What has no annotation counts as not parsed.
        judge.fn_completion_parser = lambda one: parse(one) if readable(one) else []
        rows = annotator.annotate_head2head(
            side(baseline), side(answers), is_ordered=True, chunksize=None
        )
    values = [row["preference"] for row in rows]
    return [None if value is None or value != value else float(value) for value in values]


def plain(text: str) -> str:
    """A text whose control words cannot end the judge's message and begin another."""
    for word in CONTROL:
        text = text.replace(word, word.replace("<|", "< |"))
    return text


def win_rates(
    preferences: Sequence[float | None],
    baseline: Sequence[str],
    answers: Sequence[str],
    places: Sequence[int],
    *,
    table: Path | None,
) -> dict[str, Any]:
    """The library's win rate and, given its table, the length-controlled one, in percent.

    The model of the length-controlled rate (Dubois et al. 2024, arXiv 2404.04475) predicts the
    preference from the difference in length, the prompt's difficulty and the model; the rate is
    what it predicts for equal lengths.

    Args:
        preferences: one a prompt, as `annotate` gives them.
        baseline: the baseline's answers, of which only the lengths matter.
        answers: the other's.
        places: each prompt's place in the published list, from 0.
        table: the library's ``df_gamed.csv``: difficulties, and preferences about two variants of
            the published baseline that are long or short on purpose; None leaves it out.

    Raises:
        UserError: the table cannot be read or lacks a prompt.
    """
    import pandas as pd
    import sklearn

    package = library()
    # By one name for both the library knows that a baseline is compared with itself: 50 %.
    student = "baseline" if list(baseline) == list(answers) else "student"
    rows = pd.DataFrame(
        {
            "preference": [float("nan") if one is None else one for one in preferences],
            "output_1": list(baseline),
            "output_2": list(answers),
            "generator_1": "baseline",
            "generator_2": student,
            "annotator": "judge",
        },
        index=list(places),
    )
    if table is None:
        return _plain_numbers(package.metrics.get_winrate(rows))
    metrics = package.metrics.glm_winrate
    try:
        with (
            _replaced(metrics, "hf_hub_download", lambda **wanted: str(table)),
            sklearn.config_context(),  # the library switches metadata routing on for all
            warnings.catch_warnings(),
        ):
            # It asks for the l1 penalty by a name that scikit-learn 1.10 takes away.
            warnings.simplefilter("ignore", FutureWarning)
            found = metrics.get_length_controlled_winrate(
                rows,
                save_weights_dir=None,
                is_add_glm_preference_inplace=False,
                is_warn_extreme_changes=False,
            )
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{table}: the length-controlled rate cannot be fitted with it "
            f"({type(error).__name__}: {error}): give the df_gamed.csv of tatsu-lab/alpaca_eval"
        ) from None
    return _plain_numbers(found)


def published_file(name: str) -> Path | None:
    """A file of the library's data set on the hub, or None where it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("tatsu-lab/alpaca_eval", name, repo_type="dataset"))
    # Offline, gated, renamed, a proxy: a dozen types that mean the same here.
    except Exception:
        return None


def _require_logprobs(ask: Ask, question: Question) -> None:
    try:
        found = ask([question])[question.id]
    except Refused as refused:
        if refused.http_status in ABOUT_THE_QUESTION:  # such as the field that asks for them
            raise NoLogprobs(str(refused)) from None
        raise
    if found.logprobs is None:
        raise NoLogprobs


def _plain_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """numpy's numbers as Python's."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in found.items()}


@contextlib.contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def _quiet(package: Any) -> Iterator[None]:
    """Without the library's bar and log lines: what it could not parse is counted by us."""
    root = logging.getLogger()
    disabled = root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with _replaced(package.utils.tqdm, "tqdm", lambda items, **about: items):
            yield
    finally:
        logging.disable(disabled)
