"""Estimates beside the truth: the metrics of a study's row, and its table."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from montessori_jax.influence import agreement

RULES = ("pairs", "relative_pairs", "mean_pairs")


def compare(truth: dict[str, Any], found: dict[str, Any], prompts: Sequence[int]) -> dict[str, Any]:
    """Agreement of ``influence`` in both, with pairs by three rules.

    ``pairs``: one candidate of a prompt above zero and one below (the paper's rule);
    ``relative_pairs``: above and below ``offset``, the zero-gradient step; ``mean_pairs``: above
    and below the mean. Where there are standard errors, the share of scores within one of the
    truth.
    """
    x, y = (np.array(one["influence"], float) for one in (truth, found))
    metrics = agreement(x, y, prompts).as_row()
    bases = {
        "relative_pairs": (truth["offset"], found["offset"] or 0.0),
        "mean_pairs": (x.mean(), y.mean()),
    }
    for rule, (of_truth, of_found) in bases.items():
        metrics[rule] = agreement(x - of_truth, y - of_found, prompts).as_row()["pairs"]
    errors = found["standard_error"]
    if None not in errors:
        metrics["within_one_standard_error"] = float(np.mean(np.abs(y - x) < np.array(errors)))
    return metrics


def table(heads: Sequence[str], rows: Iterable[tuple[Sequence[str], dict[str, Any]]]) -> str:
    """Markdown: each row's own cells under ``heads``, then its metrics."""
    shared = ("Spearman", "pairs", "relative to the shared step", "to the mean", "error", "centred")
    lines = [f"| {' | '.join((*heads, *shared))} |", "|---" * (len(heads) + len(shared)) + "|"]
    for cells, found in rows:
        error = found["error"] or {"total": None, "centred": None}
        numbers = [
            found["spearman"],
            *(found[rule]["jaccard"] for rule in RULES),
            *(error[part] for part in ("total", "centred")),
        ]
        shown = ["" if number is None else f"{number:.4f}" for number in numbers]
        lines.append(f"| {' | '.join((*cells, *shown))} |")
    return "\n".join(lines)
