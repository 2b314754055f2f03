"""What estimators cost, in multiplications and additions: enough to put them in order."""

from typing import NamedTuple

from montessori_jax.influence.expansion import PILOTS

# From cheap to dear for large pools; in small ones the pilots weigh more (`ladder`).
AUTOMATIC = ("linearized", "first_order", "control_variate")


class Cost(NamedTuple):
    """FLOPs of one student: once, and for each candidate."""

    once: float
    each: float

    def of(self, candidates: int) -> float:
        return self.once + self.each * candidates


def costs(
    parameters: float,
    candidate_tokens: float,
    reference_tokens: float,
    *,
    part: float = 0.125,
    pilots: int = PILOTS,
) -> dict[str, Cost]:
    """The cost of each estimator; ``2NT`` a forward pass, ``6NT`` a gradient.

    Args:
        parameters: N.
        candidate_tokens: T, of a usual candidate.
        reference_tokens: R.
        part: the share of the reference that `control_variate` measures.
        pilots: candidates that `linearized` is fitted on.
    """
    probe = 6 * parameters * candidate_tokens
    forward = 2 * parameters * reference_tokens
    start = 2 * forward + 3 * forward
    return {
        "linearized": Cost(start + pilots * probe * 8 / 3, probe * 2 / 3),
        "first_order": Cost(start, probe),
        "control_variate": Cost(start, probe + 3 * part * forward),
        "exact": Cost(2 * forward, probe + forward),
        "second_order": Cost(start, probe + 5 * forward),
        "grad_dot": Cost(3 * forward, probe),
        "grad_cos": Cost(3 * forward, probe),
        "less": Cost(3 * forward, probe),
    }


def ladder(known: dict[str, Cost], candidates: int, *, start: str | None = None) -> list[str]:
    """Estimators from the cheapest up that cost less than ``exact`` on so many candidates.

    With ``start`` that one, and then those that cost more than it.
    """
    order = sorted(AUTOMATIC, key=lambda name: known[name].of(candidates))
    cheaper = [name for name in order if known[name].of(candidates) < known["exact"].of(candidates)]
    if start is None:
        return cheaper
    above = known[start].of(candidates)
    return [start, *(name for name in cheaper if known[name].of(candidates) > above)]
