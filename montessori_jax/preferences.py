"""Scored candidates -> preference pairs, under one prompt, by one of three rules.

`sign` is the paper's (arXiv 2410.14208, section 3.2): each candidate with positive influence is
preferred to each with negative influence. Momentum can move every candidate of a warmed-up student
to one side of zero, and then it builds nothing; `relative` measures against the step that a zero
gradient would have taken, `extremes` takes the best and the worst of the prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from montessori_jax.config import PreferencesConfig
from montessori_jax.errors import UserError


@dataclass(frozen=True)
class Scored:
    """One candidate with its influence.

    ``influence`` is reference loss before minus after, in nats, or None where it could not be
    measured; ``offset`` is the influence of a step with a zero gradient; ``text`` is what the
    teacher wrote, word for word.
    """

    id: str
    prompt_id: str
    text: str
    influence: float | None
    offset: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two candidates of one prompt, ``chosen`` with the larger influence."""

    prompt_id: str
    chosen: Scored
    rejected: Scored

    @property
    def gap(self) -> float:
        """Difference of the two influences, in nats; positive."""
        return _influence(self.chosen) - _influence(self.rejected)


@dataclass
class PairReport:
    """How many prompts gave pairs, and why the others gave none."""

    rule: str
    prompts: int = 0
    pairs: int = 0
    without: dict[str, int] = field(default_factory=dict)


def _influence(candidate: Scored) -> float:
    assert candidate.influence is not None
    return candidate.influence


def _baseline(rule: str, members: Sequence[Scored]) -> float:
    if rule == "sign":
        return 0.0
    offset = members[0].offset
    if offset is None:
        raise UserError(
            "rule 'relative' needs the influence of the zero-gradient step ('offset'): score with "
            "montessori influence, or take the rule 'extremes'"
        )
    return offset


def _pairs_of(rule: str, members: Sequence[Scored]) -> tuple[list[Pair], str]:
    """The pairs of one prompt, or the cause of having none."""
    if len(members) < 2:
        return [], "fewer than two scored candidates"
    prompt = members[0].prompt_id
    if rule == "extremes":
        ranked = sorted(members, key=_influence)
        worst, best = ranked[0], ranked[-1]
        if _influence(best) == _influence(worst):
            return [], "all influences equal"
        pairs = [Pair(prompt, best, worst)]
    else:
        base = _baseline(rule, members)
        helpful = [one for one in members if _influence(one) > base]
        harmful = [one for one in members if _influence(one) < base]
        if not helpful or not harmful:
            return [], "all on one side"
        pairs = [Pair(prompt, good, bad) for good in helpful for bad in harmful]
    different = [pair for pair in pairs if pair.chosen.text != pair.rejected.text]
    return different, "" if different else "same text on both sides"


def build_pairs(
    candidates: Sequence[Scored], settings: PreferencesConfig
) -> tuple[list[Pair], PairReport]:
    """All pairs by ``settings.rule``, the widest gaps of each prompt first.

    Prompts keep the order of their first candidate. Candidates without a finite influence take no
    part. Raises `UserError` when ``relative`` is asked for and the scores carry no offset.
    """
    prompts: dict[str, list[Scored]] = {}
    for one in candidates:
        members = prompts.setdefault(one.prompt_id, [])
        if one.influence is not None and math.isfinite(one.influence):
            members.append(one)
    report = PairReport(settings.rule, prompts=len(prompts))
    pairs: list[Pair] = []
    for members in prompts.values():
        found, cause = _pairs_of(settings.rule, members)
        if cause:
            report.without[cause] = report.without.get(cause, 0) + 1
        found.sort(key=lambda pair: (-pair.gap, pair.chosen.id, pair.rejected.id))
        pairs += found[: settings.max_pairs_per_prompt or None]
    report.pairs = len(pairs)
    return pairs, report


def helpful(candidates: Sequence[Scored], settings: PreferencesConfig) -> list[Scored]:
    """The candidates that are worth learning from by themselves, in order, by the same rules.

    By ``sign`` those with positive influence, by ``relative`` those above the step of a zero
    gradient, by ``extremes`` the best of each prompt that has a worse one.
    """
    prompts: dict[str, list[Scored]] = {}
    for one in candidates:
        if one.influence is not None and math.isfinite(one.influence):
            prompts.setdefault(one.prompt_id, []).append(one)
    found: list[Scored] = []
    for members in prompts.values():
        if settings.rule == "extremes":
            best = max(members, key=_influence)
            if any(_influence(one) < _influence(best) for one in members):
                found.append(best)
        else:
            base = _baseline(settings.rule, members)
            found += [one for one in members if _influence(one) > base]
    return found


def hold_out(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split into training and held-out pairs, whole prompts at a time.

    At least one prompt is held out when ``fraction`` is positive and there are two prompts.
    """
    prompts = list(dict.fromkeys(pair.prompt_id for pair in pairs))
    count = min(math.ceil(fraction * len(prompts)), len(prompts) - 1)
    order = np.random.Generator(np.random.Philox(key=[seed, len(prompts)])).permutation(
        len(prompts)
    )
    held = {prompts[i] for i in order[: max(count, 0)]}
    return (
        [pair for pair in pairs if pair.prompt_id not in held],
        [pair for pair in pairs if pair.prompt_id in held],
    )
