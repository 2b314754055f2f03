"""How much there is to do in one iteration of the loop, from its settings: tokens, steps, rows.

Lengths are not known before text is written: `Lengths` are assumed and can be replaced. The same
arithmetic is behind the figures in the headers of ``configs/`` (docs/gpu.md).
"""

from dataclasses import dataclass
from typing import NamedTuple

from montessori_jax.config import RunConfig


@dataclass(frozen=True)
class Lengths:
    """Tokens of a generation prompt, of an instruction, of the longest one that is kept, of a
    response, and of what a judge is shown and says: assumed, not measured."""

    prompt: int = 1000
    instruction: int = 60
    longest: int = 256
    response: int = 300
    judged: int = 700
    judgement: int = 200

    @property
    def sample(self) -> int:
        """An instruction with its response."""
        return self.instruction + self.response


ASSUMED = Lengths()


class Written(NamedTuple):
    """Texts that a section of the settings is for, in tokens: a prompt, the longest one that is
    made room for, and what is written to it."""

    name: str
    prompt: int
    longest: int
    written: int


WRITTEN = {
    "generation": Written("instructions", ASSUMED.prompt, ASSUMED.prompt, ASSUMED.instruction),
    "responses": Written("responses", ASSUMED.instruction, ASSUMED.longest, ASSUMED.response),
    "judging": Written("judgements", ASSUMED.judged, ASSUMED.judged, ASSUMED.judgement),
}


def written_as(section: str, samples: int) -> str:
    """What a section's texts are called."""
    name = WRITTEN[section].name
    return name if samples == 1 else f"{name}, {samples} a prompt"


@dataclass(frozen=True)
class Work:
    """One iteration.

    Attributes:
        warmup_tokens: that the student is warmed up on.
        candidates: that are scored.
        candidate_tokens: of all of them.
        audited: candidates that are measured again by the definition.
        reference_tokens: of the reference set.
        pair_tokens: of all pairs' rows, the prompt counted twice; half of the candidates are
            assumed to help.
        students: that are trained from new.
        sft_tokens: that each of them learns from.
    """

    warmup_tokens: float
    candidates: float
    candidate_tokens: float
    audited: int
    reference_tokens: int
    pair_tokens: float
    students: int
    sft_tokens: float


def work_of(config: RunConfig, lengths: Lengths = ASSUMED) -> Work:
    """What one iteration of ``config`` does."""
    samples = config.generation.samples
    probed = config.generation.prompts * (1 - config.warmup_fraction)
    warm = config.generation.prompts * config.warmup_fraction * samples
    pairs = probed * samples * (samples - 1) / 4
    students = 2 if config.compare_self_instruct else 1
    return Work(
        warmup_tokens=min(warm, config.warmup.rows) * lengths.sample,
        candidates=probed * samples,
        candidate_tokens=probed * samples * lengths.sample,
        audited=config.influence.audit,
        reference_tokens=config.data.num_reference * lengths.sample,
        pair_tokens=pairs * 2 * (lengths.prompt + lengths.instruction),
        students=students,
        sft_tokens=config.sft.rows * lengths.sample,
    )
