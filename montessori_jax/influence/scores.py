"""What goes into a scorer and what comes out: one candidate, one score."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """One sample to be scored.

    ``data`` is what the candidate loss reads, a pytree of arrays without a batch axis. Candidates
    of equal shapes share one compiled program. None says that it cannot be scored, and ``reason``
    why.
    """

    id: str
    data: Any
    reason: str | None = None


class Measured(NamedTuple):
    """A candidate's influence on one reference set, in nats; fields as in `Score`."""

    influence: float
    loss_before: float | None = None
    loss_after: float | None = None
    offset: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class Score:
    """The local data influence of one candidate, in nats of reference loss.

    Attributes:
        id: the candidate's.
        influence: reference loss before minus after one step on it; positive helps. None where
            it could not be measured, for ``reason``. Baselines (`grad_dot`, `grad_cos`, `less`)
            have their own units.
        loss_before: reference loss of the student as it is; None where nothing was run.
        loss_after: reference loss after the step, where the method measures it.
        offset: influence of the step with a zero gradient, which every candidate's step shares
            through momentum and weight decay; ``influence - offset`` is the candidate's own part.
        method: the estimator's name.
        candidate_loss: the student's loss on the candidate before the step.
        reason: why there is no influence, or none on one of several reference sets.
        standard_error: of ``influence``, where the method samples.
        sets: with several reference sets, the numbers of `Measured` for each by name. The fields
            above are those of the first set.
    """

    id: str
    influence: float | None
    loss_before: float | None
    loss_after: float | None
    offset: float | None
    method: str
    candidate_loss: float | None = None
    reason: str | None = None
    standard_error: float | None = None
    sets: dict[str, dict[str, float | None]] | None = None

    def on(self, name: str) -> float | None:
        """The influence on one reference set, by its name; there may be one alone."""
        return self.influence if self.sets is None else self.sets[name]["influence"]

    def as_row(self) -> dict[str, Any]:
        """The score as one JSON-able row; ``Score(**row)`` is the score again."""
        return asdict(self)


def unmeasured(candidate: Candidate, method: str) -> Score:
    """The score of a candidate that cannot be run at all."""
    reason = candidate.reason or "no data"
    return Score(candidate.id, None, None, None, None, method, reason=reason)


def measured_score(
    candidate: Candidate,
    candidate_loss: float,
    measured: Mapping[str, Measured],
    method: str,
) -> Score:
    """A score as measured; without a number, and with the reason, where that is not finite."""
    first = next(iter(measured.values()))
    reason = None
    if not math.isfinite(candidate_loss):
        reason = f"the loss on the candidate is {candidate_loss}"
    own = _as_far_as_finite(first, reason)
    sets = None
    if len(measured) > 1:
        sets = {name: _as_far_as_finite(one, reason) for name, one in measured.items()}
    for name, one in measured.items():
        if reason is None and not math.isfinite(one.influence):
            where = "" if one is first else f" on {name}"
            reason = f"the step on the candidate gives an influence of {one.influence}{where}"
    return Score(
        id=candidate.id,
        **own,
        method=method,
        candidate_loss=candidate_loss if math.isfinite(candidate_loss) else None,
        reason=reason,
        sets=sets,
    )


def _as_far_as_finite(one: Measured, reason: str | None) -> dict[str, float | None]:
    values = one._asdict()
    if reason or not math.isfinite(one.influence):
        values |= {"influence": None, "loss_after": None, "standard_error": None}
    if one.standard_error is not None and not math.isfinite(one.standard_error):
        values["standard_error"] = None
    return values


# Scores a few candidates, in their order. Made once per student by an estimator's function.
Scorer = Callable[[Sequence[Candidate]], list[Score]]
