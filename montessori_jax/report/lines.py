"""One line a stage: what came of it."""

from typing import Any

from montessori_jax.stages.influence import audit_line

Result = dict[str, Any]


def generated(r: Result) -> str:
    return f"{r['kept']} of {r['candidates']} candidates kept, {r['rows']} with a response"


def split(r: Result) -> str:
    return f"{r['warmup']} rows to warm up, {r['probing']} to probe"


def trained(r: Result) -> str:
    losses = f"loss {r['first_loss']:.3f} -> {r['last_loss']:.3f}"
    return f"{r['rows']} rows, {losses} in {r['steps']} steps"


def scored(r: Result) -> str:
    positive = f"{r['positive_share']:.0%} positive"
    return f"{r['scored']} scored, {r['null']} not, {positive}{audit_line(r['audit'])}"


def preferred(r: Result) -> str:
    pairs = f"{r['pairs']} pairs ({r['heldout']} held out) by rule '{r['rule']}'"
    return f"{pairs}, {r['prompts_without']} of {r['prompts']} prompts gave none"


def tuned(r: Result) -> str:
    line = f"{r['pairs']} pairs, loss {r['first_loss']:.3f} -> {r['last_loss']:.3f}"
    held = r.get("heldout_after")
    if held is None:
        return line
    margin, accuracy = held["reward_margin"], held["reward_accuracy"]
    return f"{line}; held out: margin {margin:+.3f}, accuracy {accuracy:.0%}"


def compared(r: Result) -> str:
    return f"{r['changed_share']:.0%} of {r['compared']} texts differ under equal seeds"


def evaluated(r: Result) -> str:
    loss = r["reference_loss"]
    return f"held-out reference loss {with_error(loss, 4)}"


def with_error(loss: Result, digits: int) -> str:
    """A loss and, where there are several samples, its standard error."""
    error = loss["standard_error"]
    text = f"{loss['loss']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
