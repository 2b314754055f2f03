"""Two answers to one prompt compared in both orders: verdicts, ties, win rates.

As in FastChat's pairwise mode (Zheng et al. 2023, arXiv 2306.05685, section 3.4): the judge sees
each pair twice with the places changed, and an answer wins only if both verdicts say so. Anything
else is a tie, which counts as half a win.
"""

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from montessori_jax.evaluation.judge_prompts import JudgePrompt, fill

Verdict = Literal["A", "B", "tie"]
Outcome = Literal["win", "loss", "tie"]
VERDICTS: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie"}
WORTH: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}

OWN_PROMPT = JudgePrompt(
    name="head-to-head",
    system="You compare two answers to the same request and say which of them serves the person "
    "who asked better: whether it does what was asked, is right, and leaves out what is of no "
    "use. Neither its length nor its place speaks for an answer. Give your reasons in a few "
    "sentences. Then end with your verdict alone on the last line: [[A]] if answer A is better, "
    "[[B]] if answer B is better, [[C]] if they are equally good.",
    template="The request:\n{question}\n\n<answer A>\n{answer_a}\n</answer A>\n\n"
    "<answer B>\n{answer_b}\n</answer B>",
)

_VERDICT = re.compile(r"\[\[([ABC])\]\]")


def read_verdict(text: str) -> Verdict | None:
    """The verdict in a judgement: ``[[A]]``, ``[[B]]`` or ``[[C]]``.

    None where there is none, or where several contradict each other, as in a text that repeats what
    it was asked to write.
    """
    found = set(_VERDICT.findall(text))
    return VERDICTS[found.pop()] if len(found) == 1 else None


def both_orders(
    prompt: JudgePrompt, ours: dict[str, str], theirs: dict[str, str], shared: dict[str, str]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The messages with our answer as A, and with it as B.

    Args:
        prompt: whose template has ``{answer_a}`` and ``{answer_b}``, or ``{answer_a_1}`` and so on.
        ours: our answers by turn: ``{"": text}``, or ``{"_1": text, "_2": text}``.
        theirs: the other side's, likewise.
        shared: the fields that do not depend on the order.
    """

    def messages(a: dict[str, str], b: dict[str, str]) -> list[dict[str, str]]:
        sides = {f"answer_a{turn}": text for turn, text in a.items()}
        sides |= {f"answer_b{turn}": text for turn, text in b.items()}
        return fill(prompt, {**shared, **sides})

    return messages(ours, theirs), messages(theirs, ours)


def outcome(first: Verdict | None, second: Verdict | None) -> Outcome | None:
    """Our outcome, of the verdict with our answer as A and of that with it as B.

    None where either could not be read.
    """
    if first is None or second is None:
        return None
    if (first, second) == ("A", "B"):
        return "win"
    if (first, second) == ("B", "A"):
        return "loss"
    return "tie"


@dataclass(frozen=True)
class PairResult:
    """How one side did against the other over prompts.

    Attributes:
        win_rate: 100 (wins + ties / 2) / judged; None where nothing was judged.
        standard_error: of ``win_rate`` over prompts; None for fewer than two.
        judged: prompts with both verdicts, or with equal answers.
        identical: prompts whose answers were equal: ties that no one was asked about.
        inconsistent: ties where the two orders disagreed.
        unparseable: prompts left out, since a verdict could not be read.
        first_place_rate: percentage of verdicts, ties left out, for the answer shown first: 50 for
            a judge that does not care; None where there are none.
    """

    win_rate: float | None
    standard_error: float | None
    wins: int
    losses: int
    ties: int
    judged: int
    identical: int
    inconsistent: int
    unparseable: int
    first_place_rate: float | None

    def as_row(self) -> dict[str, Any]:
        return asdict(self)

    def reversed(self) -> "PairResult":
        """The same from the other side."""
        values = asdict(self) | {"wins": self.losses, "losses": self.wins}
        if self.win_rate is not None:
            values["win_rate"] = 100.0 - self.win_rate
        return PairResult(**values)


Compared = tuple[Verdict | None, Verdict | None] | None
"""The verdict with our answer as A, and that with it as B; None for two equal answers, a tie."""


def summarise_pairs(
    compared: Sequence[Compared], clusters: Sequence[Hashable] | None = None
) -> PairResult:
    """Win rate, ties and the judge's liking for the first place.

    Args:
        compared: one a prompt.
        clusters: what each belongs to, where several are not independent (turns of a question).
    """
    outcomes: list[Outcome | None] = [
        "tie" if pair is None else outcome(*pair) for pair in compared
    ]
    known = [number for number, one in enumerate(outcomes) if one is not None]
    worth = [WORTH[one] for one in outcomes if one is not None]
    groups = known if clusters is None else [clusters[number] for number in known]
    mean, error = mean_with_error(worth, groups)
    asked = [pair for pair in compared if pair is not None]
    readable = [one for pair in asked for one in pair if one is not None and one != "tie"]
    return PairResult(
        win_rate=None if mean is None else 100 * mean,
        standard_error=None if error is None else 100 * error,
        wins=outcomes.count("win"),
        losses=outcomes.count("loss"),
        ties=outcomes.count("tie"),
        judged=len(known),
        identical=len(compared) - len(asked),
        inconsistent=sum(outcome(*pair) == "tie" and pair != ("tie", "tie") for pair in asked),
        unparseable=outcomes.count(None),
        first_place_rate=100 * readable.count("A") / len(readable) if readable else None,
    )


def mean_with_error(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float | None, float | None]:
    """Mean m, and its standard error; None where there are too few values.

    With residual sums r_g of G clusters of N values in all, the error is
    sqrt(G / (G - 1) sum_g r_g^2) / N: for clusters of one value each, the usual s / sqrt(N).
    """
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for number, value in enumerate(values):
        group = number if clusters is None else clusters[number]
        sums[group] = sums.get(group, 0.0) + value - mean
    if len(sums) < 2:
        return mean, None
    squares = math.fsum(one * one for one in sums.values())
    return mean, math.sqrt(len(sums) / (len(sums) - 1) * squares) / len(values)
