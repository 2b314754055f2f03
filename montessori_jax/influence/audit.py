"""Scores held to the definition on a random subset, and the cheapest estimator that holds."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from montessori_jax.influence.agreement import Agreement, agreement
from montessori_jax.influence.bootstrap import Interval, bootstrap_intervals
from montessori_jax.influence.scores import Score

log = logging.getLogger(__name__)

FEWEST, MOST, SHARE = 8, 32, 0.15
OnFailure = Literal["fallback", "warn"]
# Places of candidates -> their scores, in order.
ScoreSome = Callable[[Sequence[int]], Sequence[Score]]


@dataclass(frozen=True)
class Floors:
    """What an estimator must reach on the audited scores; None does not ask.

    Attributes:
        spearman: least rank correlation.
        pairs: least Jaccard index of the preference pairs.
        error: largest normalised root-mean-square error.
    """

    spearman: float | None = 0.95
    pairs: float | None = 0.7
    error: float | None = 0.4

    def failures(self, found: Agreement) -> tuple[str, ...]:
        """What falls short, in words; metrics that are not defined do not count."""
        error = None if found.error is None else found.error.total
        pairs = None if found.pairs is None else found.pairs.jaccard
        failed = []
        for name, value, floor in (
            ("Spearman", found.spearman, self.spearman),
            ("pair agreement", pairs, self.pairs),
        ):
            if value is not None and floor is not None and value < floor:
                failed.append(f"{name} {value:.3f} is below {floor:g}")
        if error is not None and self.error is not None and error > self.error:
            failed.append(f"normalised error {error:.3f} is above {self.error:g}")
        return tuple(failed)


@dataclass(frozen=True)
class Audited:
    """One score and what it is in truth, in nats."""

    id: str
    estimate: float
    truth: float


@dataclass(frozen=True)
class Audit:
    """One estimator held to ``exact`` in float32.

    Attributes:
        method: the estimator.
        agreement: the metrics.
        intervals: 95% bootstrap intervals of the main ones.
        failures: which floors were missed; empty where it passed.
        scores: every audited score.
    """

    method: str
    agreement: Agreement
    intervals: Mapping[str, Interval | None]
    failures: tuple[str, ...]
    scores: tuple[Audited, ...]

    @property
    def count(self) -> int:
        return len(self.scores)

    def as_row(self) -> dict[str, Any]:
        """Nested JSON-able values."""
        return asdict(self)

    def line(self) -> str:
        """The audit in a few words."""
        found = self.agreement
        parts = []
        if found.spearman is not None:
            parts.append(f"Spearman {found.spearman:.3f}{_range(self.intervals['spearman'])}")
        if found.pairs is not None and found.pairs.jaccard is not None:
            parts.append(f"pairs {found.pairs.jaccard:.2f}{_range(self.intervals['pairs'])}")
        if found.error is not None:
            text = f"normalised error {found.error.total:.3f}{_range(self.intervals['error'])}"
            parts.append(text)
        return f"{self.method}, {self.count} audited: {', '.join(parts) or 'nothing to compare'}"


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"


@dataclass(frozen=True)
class Choice:
    """The estimator to use and the audits that led to it.

    ``scores`` is that estimator as it was audited, pilots and reference gradient included; None
    where none was made.
    """

    method: str
    audits: tuple[Audit, ...]
    scores: ScoreSome | None = field(default=None, compare=False, repr=False)

    @property
    def audit(self) -> Audit | None:
        """The audit of the method itself; None for ``exact`` where nothing else passed."""
        return next((one for one in self.audits if one.method == self.method), None)


def audit_count(most: int, candidates: int, scoring_cost: float, true_cost: float) -> int:
    """How many scores to measure again.

    At most ``most`` (32 by default) and 15% of the whole cost, but at least 8; and never more than
    ``most`` or than there are.

    Args:
        most: the setting.
        candidates: how many could be audited.
        scoring_cost: of all scores, in any unit.
        true_cost: of one true score, in the same.
    """
    affordable = int(SHARE / (1 - SHARE) * scoring_cost / true_cost) if true_cost > 0 else most
    return min(most, candidates, max(FEWEST, affordable))


def choose_audited(
    usable: Sequence[int], count: int, seed: int, groups: Sequence[Hashable] | None = None
) -> list[int]:
    """A random ``count`` of the places ``usable``, in order; prompt by prompt where groups are
    given, so that there are pairs to compare. The same for the same places and seed."""
    draw = np.random.Generator(np.random.Philox(key=[seed, len(usable)]))
    if groups is None:
        return sorted(usable[place] for place in draw.permutation(len(usable))[:count])
    members: dict[Hashable, list[int]] = {}
    for place in usable:
        members.setdefault(groups[place], []).append(place)
    prompts = list(members.values())
    order = [place for at in draw.permutation(len(prompts)) for place in prompts[at]]
    return sorted(order[:count])


def audit(
    method: str,
    truth: Sequence[Score],
    scores: Sequence[Score],
    groups: Sequence[Hashable] | None = None,
    *,
    floors: Floors | None = None,
    baseline: float = 0.0,
    seed: int = 0,
) -> Audit | None:
    """Compare scores with true ones of the same candidates; None where nothing can be compared.

    Args:
        method: the estimator's name.
        truth: `exact`'s scores.
        scores: the estimator's, in the same order.
        groups: each candidate's prompt, to compare preference pairs and resample by.
        floors: what is asked for; by default `Floors`.
        baseline: what signs and pairs are relative to (`agreement`).
        seed: of the bootstrap.
    """
    rows, labels = [], []
    for place, (true, found) in enumerate(zip(truth, scores, strict=True)):
        if true.influence is not None and found.influence is not None:
            rows.append(Audited(found.id, found.influence, true.influence))
            labels.append(None if groups is None else groups[place])
    if not rows:
        return None
    x = np.array([row.truth for row in rows])
    y = np.array([row.estimate for row in rows])
    named = None if groups is None else labels
    measured = agreement(x, y, named, baseline=baseline)
    return Audit(
        method,
        measured,
        bootstrap_intervals(x, y, named, baseline=baseline, seed=seed),
        (floors or Floors()).failures(measured),
        tuple(rows),
    )


def choose_method(
    ladder: Mapping[str, Callable[[], ScoreSome]],
    truth: ScoreSome,
    audited: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    *,
    floors: Floors | None = None,
    on_failure: OnFailure = "fallback",
    last: str = "exact",
    baseline: float = 0.0,
    seed: int = 0,
) -> Choice:
    """The first estimator of ``ladder`` that passes its audit; each is told of in the log.

    Args:
        ladder: estimators by name, the cheapest first; each is made only when its turn comes.
        truth: scores by the definition, in float32.
        audited: places of the candidates to compare.
        groups: the prompt of every candidate, audited or not.
        floors: what an estimator must reach.
        on_failure: ``warn`` takes the first one whatever its audit says.
        last: what is left when none passes.
        baseline: what signs and pairs are relative to.
        seed: of the bootstrap.
    """
    if not audited:
        return Choice(next(iter(ladder), last), ())
    true = truth(audited)
    labels = None if groups is None else [groups[place] for place in audited]
    audits: list[Audit] = []
    for name, make in ladder.items():
        scores = make()
        found = audit(
            name, true, scores(audited), labels, floors=floors, baseline=baseline, seed=seed
        )
        if found is None:
            log.warning("no audited candidate has a score: %s is taken unaudited", name)
            return Choice(name, tuple(audits), scores)
        audits.append(found)
        log.info("%s", found.line())
        if not found.failures:
            return Choice(name, tuple(audits), scores)
        log.warning("%s FAILED ITS AUDIT: %s", name, "; ".join(found.failures))
        if on_failure == "warn":
            return Choice(name, tuple(audits), scores)
        del scores  # before the next one is made: each holds a gradient
    log.warning("no cheaper estimator passed: %s", last)
    return Choice(last, tuple(audits))
