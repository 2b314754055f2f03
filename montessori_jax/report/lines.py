"""One line a stage: what came of it."""

from collections.abc import Callable
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


def responded(r: Result) -> str:
    return f"{r['responses']} responses to {r['instructions']} instructions, {r['empty']} empty"


def judged(r: Result) -> str:
    unparsed = f"{r['unparsed']} of {r['judgements'] + r['unparsed']} judgements without a score"
    return f"{r['scored']} of {r['rows']} scored by {r['judge']}, mean {r['mean']:.2f}, {unparsed}"


def losses_measured(r: Result) -> str:
    return f"{r['rows']} losses of {r['lowest']:.3f} to {r['highest']:.3f}, mean {r['mean']:.3f}"


def drawn(r: Result) -> str:
    return f"{r['rows']} random scores"


def helpful(r: Result) -> str:
    return f"{r['helpful']} of {r['candidates']} candidates are helpful"


def expanded(r: Result) -> str:
    return f"{r['expanded']} hard seeds expanded: {generated(r)}"


def mixed(r: Result) -> str:
    return f"{r['rows']} rows, {r['seeds']} of them seeds"


def curved(r: Result) -> str:
    return f"{r['teachers']} teachers along DPO, {r['states']} states along training"


def compared(r: Result) -> str:
    return f"{r['changed_share']:.0%} of {r['compared']} texts differ under equal seeds"


def evaluated(r: Result) -> str:
    return "; ".join(line(r[name]) for name, line in EVALUATED.items() if name in r)


def heldout_loss(r: Result) -> str:
    """Of the evaluation ``reference_loss``."""
    return f"held-out reference loss {with_error(r, 4)} on {r['samples']} rows"


def with_error(loss: Result, digits: int) -> str:
    """A loss and, where there are several samples, its standard error."""
    error = loss["standard_error"]
    text = f"{loss['loss']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def harness(r: Result) -> str:
    """Of the evaluation ``lm_harness``: the first score of what was asked for by name."""
    found = {**r["tasks"], **r["groups"]}
    scores = {name: _first_score(found.get(name, {})) for name in r["named"]}
    shown = [f"{name} {score}" for name, score in scores.items() if score]
    return ", ".join(shown) or f"{len(r['tasks'])} tasks of lm-evaluation-harness"


def _first_score(found: Result) -> str:
    """The first metric, which unlike shots and samples is a float; "" where there is none."""
    for name, value in found.items():
        if isinstance(value, float):
            error = found.get(_error_of(name))
            return f"{name} {value:.3f}" + ("" if error is None else f" ± {error:.3f}")
    return ""


def _error_of(metric: str) -> str:
    name, comma, chosen = metric.partition(",")
    return f"{name}_stderr{comma}{chosen}"


def alpaca_eval(r: Result) -> str:
    raw = _percent(r["win_rate"], r["standard_error"])
    fitted = r["length_controlled_win_rate"]
    error = r["length_controlled_standard_error"]
    controlled = f" (length-controlled {_percent(fitted, error)})" if fitted is not None else ""
    unread = f", {r['unparseable']} not parsed" if r["unparseable"] else ""
    return f"AlpacaEval win rate {raw}{controlled} over {r['baseline']}{unread}"


def mt_bench(r: Result) -> str:
    if r["score"] is None:
        return f"MT-Bench: no rating in {r['unparseable']} judgements"
    error = r["standard_error"]
    shown = f"{r['score']:.2f}" + ("" if error is None else f" ± {error:.2f}")
    unread = f", {r['unparseable']} not parsed" if r["unparseable"] else ""
    return f"MT-Bench {shown} of 10{unread}"


def _percent(rate: float | None, error: float | None) -> str:
    if rate is None:
        return "unknown"
    return f"{rate:.1f} %" if error is None else f"{rate:.1f} ± {error:.1f} %"


EVALUATED: dict[str, Callable[[Result], str]] = {
    "reference_loss": heldout_loss,
    "lm_harness": harness,
    "alpaca_eval": alpaca_eval,
    "mt_bench": mt_bench,
}
