"""Trainings of several seeds as gains with intervals, for `benchmarks.benefit`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

SETS = ("heldout", "reference")
# Of one seed, by what was trained on (``before``, ``random``, ``exact/top``, ...): losses on each
# of the sets, and facts of the rows. Several trainings for random.
Trainings = dict[str, list[dict[str, Any]]]


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95% interval by Student's t over seeds; no interval for one seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(seeds: Sequence[Trainings]) -> dict[str, Any]:
    """Gains over seeds of each selector's parts, and differences paired by seed."""

    def mean(seed: Trainings, name: str, field: str) -> float:
        return float(np.mean([one[field] for one in seed[name]]))

    def better(name: str, other: str) -> dict[str, Any]:
        """By how much the loss after ``name`` is below that after ``other``."""
        return {
            on: interval([mean(seed, other, on) - mean(seed, name, on) for seed in seeds])
            for on in SETS
        }

    def shared(name: str, other: str) -> float:
        pairs = [(seed[name][0]["places"], seed[other][0]["places"]) for seed in seeds]
        return float(np.mean([np.isin(*pair).mean() for pair in pairs]))

    def entry(name: str) -> dict[str, Any]:
        facts = {
            field: float(np.mean([mean(seed, name, field) for seed in seeds]))
            for field in ("response_tokens", "swapped")
        }
        if name != "random":
            facts["minus_random"] = better(name, "random")
            facts["shared_with_exact"] = shared(name, f"exact/{name.rpartition('/')[2]}")
        return {"gain": better(name, "before"), **facts}

    return {
        "seeds": len(seeds),
        "loss_before": {on: interval([mean(seed, "before", on) for seed in seeds]) for on in SETS},
        "warmup_loss": interval([mean(seed, "before", "warmup_loss") for seed in seeds]),
        "trained_on": {name: entry(name) for name in seeds[0] if name != "before"},
        "top_minus_bottom": {
            name: better(f"{name}/top", f"{name}/bottom")
            for name, _, part in (one.partition("/") for one in seeds[0])
            if part == "top"
        },
        # Each seed's own numbers, for whoever wants another summary.
        "losses": [
            {name: [{on: one[on] for on in SETS} for one in made] for name, made in seed.items()}
            for seed in seeds
        ],
    }


def table(found: dict[str, Any]) -> Iterator[str]:
    """Markdown, in thousandths of a nat."""

    def show(one: dict[str, float | None]) -> str:
        mean, low, high = ("" if v is None else f"{1000 * v:+.1f}" for v in one.values())
        return f"{mean} [{low}, {high}]" if low else mean

    yield (
        "| trained on | gain, held out | minus random, held out | minus random, reference "
        "| shared with exact | tokens | swapped |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, one in found["trained_on"].items():
        cells = [name, show(one["gain"]["heldout"]), "", "", ""]
        if "minus_random" in one:
            cells[2:4] = [show(one["minus_random"][on]) for on in SETS]
            cells[4] = f"{one['shared_with_exact']:.0%}"
        yield f"| {' | '.join(cells)} | {one['response_tokens']:.0f} | {one['swapped']:.0%} |"
