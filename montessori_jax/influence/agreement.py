"""How well estimated scores agree with true ones: ranks, signs, sizes, and the pairs they make.

Everything takes float arrays ``[n]`` and gives a float, or None where it is not defined (too few
scores, all equal, no pair). Rank correlation alone hides a wrong offset: it can be .98 where only
a fifth of the preference pairs are right.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Scores = Float[np.ndarray, " n"]


def ranks(values: Scores) -> Scores:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _all_equal(values: Scores) -> bool:
    """Whether there is no spread: that of equal scores is seldom 0, as their mean is rounded."""
    return not float(np.ptp(values)) > 0


def pearson(truth: Scores, estimate: Scores) -> float | None:
    """Linear correlation, ``cov / (std std)``."""
    if _all_equal(truth) or _all_equal(estimate):
        return None
    x, y = truth - truth.mean(), estimate - estimate.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else None


def spearman(truth: Scores, estimate: Scores) -> float | None:
    """Rank correlation: `pearson` of `ranks`."""
    return pearson(ranks(truth), ranks(estimate))


def kendall(truth: Scores, estimate: Scores) -> float | None:
    """Kendall's tau-b: concordant minus discordant pairs, over the untied ones of each side."""
    x = np.sign(truth[:, None] - truth[None, :])
    y = np.sign(estimate[:, None] - estimate[None, :])
    untied = math.sqrt(float(np.abs(x).sum()) * float(np.abs(y).sum()))
    return float((x * y).sum()) / untied if untied else None


@dataclass(frozen=True)
class SignAgreement:
    """Share of scores with the true sign: of all, of the truly positive, of the truly negative."""

    overall: float
    positive: float | None
    negative: float | None


def sign_agreement(truth: Scores, estimate: Scores, baseline: float = 0.0) -> SignAgreement:
    """Signs of ``scores - baseline``; where all true scores lie on one side, look at both rates."""
    right = np.sign(truth - baseline) == np.sign(estimate - baseline)

    def rate(members: np.ndarray) -> float | None:
        return float(right[members].mean()) if members.any() else None

    return SignAgreement(float(right.mean()), rate(truth > baseline), rate(truth < baseline))


def top_overlap(truth: Scores, estimate: Scores, count: int) -> float:
    """Share of the ``count`` truly best that are among the ``count`` estimated best."""

    def best(scores: Scores) -> set[int]:
        return set(np.argsort(-scores, kind="stable")[:count].tolist())

    return len(best(truth) & best(estimate)) / count


@dataclass(frozen=True)
class ErrorSize:
    """Errors in units of the true scores' standard deviation; ``total^2 = offset^2 + centred^2``.

    ``offset`` is the error of the mean, which all scores share; ``centred`` the root mean square
    of what is left.
    """

    total: float
    offset: float
    centred: float


def error_size(truth: Scores, estimate: Scores) -> ErrorSize | None:
    """Normalised root-mean-square error, split into its shared and its own part."""
    if _all_equal(truth):
        return None
    error = (estimate - truth) / float(truth.std())
    offset = abs(float(error.mean()))
    return ErrorSize(float(np.sqrt(np.mean(error**2))), offset, float(error.std()))


def sign_pairs(
    scores: Scores, groups: Sequence[Hashable], baseline: float = 0.0
) -> set[tuple[int, int]]:
    """Preference pairs ``(chosen, rejected)``: of one prompt, each above the baseline x each below.

    Args:
        scores: one a candidate.
        groups: the prompt of each candidate.
        baseline: 0 for the paper's rule, the zero-gradient step's influence for the relative one.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return {
        (good, bad)
        for group in members.values()
        for good in group
        if scores[good] > baseline
        for bad in group
        if scores[bad] < baseline
    }


@dataclass(frozen=True)
class PairAgreement:
    """Estimated preference pairs against the true ones, summed over prompts."""

    true_pairs: int
    estimated_pairs: int
    precision: float | None
    recall: float | None
    jaccard: float | None


def pair_agreement(
    truth: Scores, estimate: Scores, groups: Sequence[Hashable], baseline: float = 0.0
) -> PairAgreement:
    """Compare the pairs of `sign_pairs`: both / estimated, both / true, both / either."""
    true, found = sign_pairs(truth, groups, baseline), sign_pairs(estimate, groups, baseline)
    both, either = len(true & found), len(true | found)
    return PairAgreement(
        true_pairs=len(true),
        estimated_pairs=len(found),
        precision=both / len(found) if found else None,
        recall=both / len(true) if true else None,
        jaccard=both / either if either else None,
    )


@dataclass(frozen=True)
class Agreement:
    """All of the above for one set of scores."""

    count: int
    spearman: float | None
    kendall: float | None
    pearson: float | None
    sign: SignAgreement
    top_overlap: float
    error: ErrorSize | None
    pairs: PairAgreement | None

    def as_row(self) -> dict[str, Any]:
        """Nested JSON-able values."""
        return asdict(self)


def agreement(
    truth: Sequence[float] | np.ndarray,
    estimate: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    baseline: float = 0.0,
    top: int | None = None,
) -> Agreement:
    """Measure how well ``estimate`` agrees with ``truth``.

    Args:
        truth: true scores.
        estimate: estimated ones, in the same order.
        groups: each candidate's prompt; without them pairs are not compared.
        baseline: what signs and pairs are relative to.
        top: size of the best set that is compared; by default a quarter.

    Raises:
        ValueError: no scores, or different numbers of them.
    """
    x, y = np.asarray(truth, np.float64), np.asarray(estimate, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"expected two equally long lists of scores, got {x.shape} and {y.shape}")
    return Agreement(
        count=len(x),
        spearman=spearman(x, y),
        kendall=kendall(x, y),
        pearson=pearson(x, y),
        sign=sign_agreement(x, y, baseline),
        top_overlap=top_overlap(x, y, top or max(1, len(x) // 4)),
        error=error_size(x, y),
        pairs=None if groups is None else pair_agreement(x, y, groups, baseline),
    )
