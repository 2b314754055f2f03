"""Which method the loop follows, what it optimises by, and what only some methods need."""

from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting
from montessori_jax.config.generation import SamplingConfig
from montessori_jax.config.training import SftConfig

MethodName = Literal["montessori", "no_finetuning", "self_instruct", "self_reward", "llm2llm"]
SignalName = Literal["influence", "judge", "training_loss", "random"]
Optimised = Literal["instruction", "response", "both", "bootstrap"]


@dataclass(frozen=True, config=STRICT)
class JudgingConfig(SamplingConfig):
    """How a judge is asked for a score from 0 to 5; `judge` says who it is."""

    samples: int = setting(1, "judgements of each response; their mean is its score", ge=1)
    temperature: float = setting(0.0, "0 is greedy", ge=0)
    max_tokens: int = setting(512, "longest judgement, in tokens", ge=1)

    @model_validator(mode="after")
    def _several_judgements_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} judgements at temperature 0 are all the same: set "
                "judging.temperature above 0, or judging.samples to 1"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class BootstrapConfig(SftConfig):
    """Fine-tuning of the teacher on its own helpful texts, in place of DPO."""

    learning_rate: float = setting(1e-6, "peak learning rate", gt=0)
    final_learning_rate: float = setting(1e-9, "learning rate at the end of the decay", ge=0)


@dataclass(frozen=True, config=STRICT)
class CurveConfig:
    """Measurements along the teacher's and the students' training (docs/methods.md)."""

    prompts: int = setting(
        0, "prompts that each teacher kept by dpo.keep_every writes data from; 0: no curve", ge=0
    )
    student_states: int = setting(
        0, "optimizer steps between states of a student that its data are measured on; 0: none",
        ge=0,
    )  # fmt: skip
    scored: int = setting(256, "rows of a data set whose influence is measured", ge=1)


@dataclass(frozen=True, config=STRICT)
class Llm2llmConfig:
    """Which seeds a teacher expands (arXiv 2403.15042)."""

    seed_rows: int = setting(1000, "seeds that the student learns from, the first usable", ge=1)
    hard_share: float = setting(
        0.25, "share of those seeds that is expanded, the highest losses", gt=0, le=1
    )
