"""What is written, how it is drawn, and which of it is kept."""

from dataclasses import field
from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """How tokens are drawn; penalties as vLLM defines them."""

    temperature: float = setting(1.0, "0 is greedy", ge=0)
    top_p: float = setting(1.0, "nucleus: smallest set of tokens with this probability", gt=0, le=1)
    top_k: int = setting(0, "keep the k likeliest tokens; 0 keeps all", ge=0)
    presence_penalty: float = setting(0.0, "subtracted once from each token generated", ge=-2, le=2)
    frequency_penalty: float = setting(
        0.0, "subtracted for each time a token was generated", ge=-2, le=2
    )
    repetition_penalty: float = setting(
        1.0, "divides (multiplies, if negative) the logits of tokens seen, prompt included", gt=0
    )
    max_tokens: int = setting(1024, "longest text generated, in tokens", ge=1)
    prompts_per_batch: int = setting(8, "prompts decoded side by side", ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "compute dtype; auto is bfloat16 on GPU and TPU, float32 on a CPU"
    )


@dataclass(frozen=True, config=STRICT)
class FilterConfig:
    """Which instructions are kept; see `montessori_jax.generation.filters`."""

    min_words: int = setting(3, "shortest instruction kept, in words", ge=0)
    max_words: int = setting(150, "longest instruction kept, in words", ge=1)
    keywords: tuple[str, ...] | None = setting(
        None, "words that may not occur; by default what a text model cannot do (images, files)"
    )
    allow_punctuation_start: bool = setting(False, "keep instructions that start with punctuation")
    allow_non_ascii_start: bool = setting(
        False, "keep instructions that start outside ASCII: needed for most other languages"
    )
    rouge_threshold: float = setting(
        0.7, "drop an instruction whose ROUGE-L F1 with a known one is above this", ge=0, le=1
    )

    @model_validator(mode="after")
    def _some_length_is_possible(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError("min_words is above max_words")
        return self


@dataclass(frozen=True, config=STRICT)
class GenerationConfig(SamplingConfig):
    """How the teacher is asked for new instructions, and which of them are kept."""

    top_p: float = setting(0.9, "nucleus: smallest set of tokens with this probability", gt=0, le=1)
    presence_penalty: float = setting(1.0, "subtracted once from each token generated", ge=-2, le=2)
    style: Literal["chat", "turns", "list"] = setting(
        "chat", "prompt: one chat turn (the paper's), exemplars as earlier turns, or a plain list"
    )
    prompts: int = setting(1000, "generation prompts for the influence probe", ge=1)
    samples: int = setting(4, "candidates a prompt", ge=1)
    seed_exemplars: int = setting(6, "exemplars drawn from the seeds", ge=1)
    generated_exemplars: int = setting(
        2, "exemplars drawn from what this run generated; seeds until there are enough", ge=0
    )
    round_prompts: int = setting(
        64, "prompts sent before generated instructions can become exemplars", ge=1
    )
    structured: bool = setting(
        False,
        "vLLM: hold instructions to their tags by a regular expression; changes what is written",
    )
    min_yield: float = setting(0.1, "stop when a smaller share of candidates is kept", ge=0, le=1)
    filters: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True, config=STRICT)
class ResponseConfig(SamplingConfig):
    """How responses to kept instructions are drawn."""

    unfinished: Literal["trim", "keep", "drop"] = setting(
        "trim", "a response cut off at max_tokens: end it at its last sentence, keep or drop it"
    )
    temperature: float = setting(0.6, "0 is greedy", ge=0)
    top_p: float = setting(0.9, "nucleus: smallest set of tokens with this probability", gt=0, le=1)
    presence_penalty: float = setting(1.0, "subtracted once from each token generated", ge=-2, le=2)
