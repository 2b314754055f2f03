"""Which rows to keep, given a number for each: the best, within groups, near-duplicates once."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from montessori_jax.errors import UserError
from montessori_jax.generation.dedupe import NearDuplicateIndex


@dataclass(frozen=True)
class Selection:
    """Places of the chosen rows, the best first, and what became of others.

    Attributes:
        places: indices into the values.
        skipped: rows without a finite value, which are never chosen.
        alike: rows passed over as near-duplicates of a better one that was chosen.
        crowded: rows passed over because their group had its share already.
    """

    places: tuple[int, ...]
    skipped: int
    alike: int = 0
    crowded: int = 0


def bounds(
    values: Sequence[float | None], errors: Sequence[float | None], z: float
) -> list[float | None]:
    """``value - z * standard error`` of each row; None where either is missing.

    A row is chosen by it for what it is worth almost surely: with ``z = 2`` an influence of 3
    with an error of 1 counts as 1. A negative ``z`` gives the upper bound, which the lowest rows
    are chosen by.
    """
    return [
        None if value is None or error is None else float(value) - z * float(error)
        for value, error in zip(values, errors, strict=True)
    ]


def select(
    values: Sequence[float | None],
    *,
    top_k: int | None = None,
    top_share: float | None = None,
    threshold: float | None = None,
    lowest: bool = False,
    groups: Sequence[Hashable | None] | None = None,
    per_group: int | None = None,
    texts: Sequence[str] | None = None,
    spread: float | None = None,
) -> Selection:
    """Choose the rows with the largest values (or the smallest), by one walk down the ranking.

    Rows are ranked by value, equal values by place, the earlier first. Down the ranking a row is
    taken unless it lies beyond ``threshold``, its group has ``per_group`` rows already, or it is
    a near-duplicate of a row that was taken; the walk ends when there are as many as asked for.
    So the same rows give the same choice, and of near-duplicates the best one stays.

    Args:
        values: one number a row, such as influence in nats; None, NaN and infinities are skipped.
        top_k: how many rows at most.
        top_share: the same as a share of the rows that have a value, in (0, 1], rounded up.
        threshold: only values of at least this; with ``lowest`` of at most this.
        lowest: from the other end.
        groups: each row's group, such as its prompt; None is a group of its own.
        per_group: rows of one group at most.
        texts: each row's text, for ``spread``.
        spread: the ROUGE-L F1 above which two texts are near-duplicates
            (`montessori_jax.generation.dedupe`; 0.7 in Self-Instruct). Texts that are equal but
            for case and white space always are, whatever their script; with 1 only those.

    Raises:
        UserError: nothing says how many, or a number is impossible.
        ValueError: ``groups`` or ``texts`` are missing, or are not one a row.
    """
    _check(top_k, top_share, threshold, per_group, spread)
    for name, given, wanted in (("groups", groups, per_group), ("texts", texts, spread)):
        if wanted is not None and (given is None or len(given) != len(values)):
            raise ValueError(f"{name} must be given, one for each of the {len(values)} values")
    numbers = {
        place: float(value)
        for place, value in enumerate(values)
        if value is not None and math.isfinite(value)
    }
    sign = 1 if lowest else -1
    ranked = sorted(numbers, key=lambda place: (sign * numbers[place], place))
    if threshold is not None:
        ranked = [place for place in ranked if sign * numbers[place] <= sign * threshold]
    most = len(ranked) if top_k is None else top_k
    if top_share is not None:
        # In decimals: 0.1 of 30 is 3, not the 4 that 3.0000000000000004 rounds up to.
        most = math.ceil(Decimal(str(float(top_share))) * len(numbers))

    places: list[int] = []
    members: Counter[Hashable] = Counter()
    index = None if spread is None else NearDuplicateIndex(threshold=spread)
    known: set[str] = set()
    alike = crowded = 0
    for place in ranked:
        if len(places) == most:
            break
        group = None if groups is None else groups[place]
        if per_group is not None and group is not None and members[group] >= per_group:
            crowded += 1
            continue
        if index is not None and texts is not None:
            plain = " ".join(texts[place].split()).casefold()
            if plain in known or index.query(texts[place]) is not None:
                alike += 1
                continue
            known.add(plain)
            index.add(texts[place])
        members[group] += 1
        places.append(place)
    return Selection(tuple(places), len(values) - len(numbers), alike, crowded)


def _check(
    top_k: int | None,
    top_share: float | None,
    threshold: float | None,
    per_group: int | None,
    spread: float | None,
) -> None:
    if all(one is None for one in (top_k, top_share, threshold, per_group, spread)):
        raise UserError(
            "nothing says how many rows to select: give top-k, top-share, threshold, per-group or "
            "spread"
        )
    if top_k is not None and top_share is not None:
        raise UserError("top-k and top-share both say how many rows to select: give one of them")
    for name, count in (("top-k", top_k), ("per-group", per_group)):
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}; it must be 1 or more")
    if top_share is not None and not 0 < top_share <= 1:
        raise UserError(f"top-share is {top_share}; it must lie above 0 and be at most 1")
    if threshold is not None and math.isnan(threshold):
        raise UserError("threshold is nan; it must be a number")
