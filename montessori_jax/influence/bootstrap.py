"""How far the agreement of a few audited scores can be trusted: percentile bootstrap."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float

from montessori_jax.influence.agreement import (
    error_size,
    pair_agreement,
    sign_agreement,
    spearman,
)

Scores = Float[np.ndarray, " n"]
Interval = tuple[float, float]
# (truth, estimate, groups, baseline) -> a metric, None where it is not defined.
Metric = Callable[[Scores, Scores, Sequence[Hashable], float], float | None]


def _error(truth: Scores, estimate: Scores, _: Sequence[Hashable], __: float) -> float | None:
    found = error_size(truth, estimate)
    return None if found is None else found.total


METRICS: dict[str, Metric] = {
    "spearman": lambda truth, estimate, _, __: spearman(truth, estimate),
    "error": _error,
    "sign": lambda truth, estimate, _, at: sign_agreement(truth, estimate, at).overall,
    "pairs": lambda *given: pair_agreement(*given).jaccard,
}


def bootstrap_intervals(
    truth: Scores,
    estimate: Scores,
    groups: Sequence[Hashable] | None = None,
    *,
    baseline: float = 0.0,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Percentile intervals of the metrics in `METRICS` (Efron and Tibshirani, chapter 13).

    Whole prompts are drawn with replacement where ``groups`` are given, as candidates of one
    prompt are alike; single candidates otherwise. A metric that fewer than half of the draws
    define has no interval.

    Args:
        truth: true scores.
        estimate: estimated ones, in the same order.
        groups: the prompt of each candidate; pairs are compared with them alone.
        baseline: what signs and pairs are relative to.
        level: coverage of the intervals.
        draws: resamples.
        seed: of the draws.
    """
    members: dict[Hashable, list[int]] = {}
    for index in range(len(truth)):
        members.setdefault(index if groups is None else groups[index], []).append(index)
    clusters = [np.array(one) for one in members.values()]
    draw = np.random.Generator(np.random.Philox(key=[seed, len(truth)]))
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(draws):
        chosen = draw.integers(len(clusters), size=len(clusters))
        rows = np.concatenate([clusters[i] for i in chosen])
        # A prompt drawn twice is two prompts: pairs are made within each.
        labels = np.repeat(np.arange(len(chosen)), [len(clusters[i]) for i in chosen]).tolist()
        for name, metric in METRICS.items():
            if name == "pairs" and groups is None:
                continue
            value = metric(truth[rows], estimate[rows], labels, baseline)
            if value is not None:
                found[name].append(value)
    tails = ((1 - level) / 2, (1 + level) / 2)
    return {
        name: (float(np.quantile(values, tails[0])), float(np.quantile(values, tails[1])))
        if len(values) >= draws / 2
        else None
        for name, values in found.items()
    }
