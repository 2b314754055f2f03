"""Optimizers, schedules, and every stage that trains."""

from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting

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
    moments_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "AdamW: how moments are kept between steps; bfloat16 saves 4 bytes a parameter"
    )
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
    micro_batch: int = setting(2, "rows on a device at one time", ge=1)
    max_length: int = setting(1024, "longest sample in tokens; the response is cut there", ge=8)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "compute dtype; parameters stay float32"
    )
    remat: Literal["none", "full", "dots"] = setting("full", "what the backward pass recomputes")
    attention: Attention = setting("auto", ATTENTION_HELP)
    checkpoint_every: int = setting(100, "optimizer steps between checkpoints", ge=1)
    checkpoints_kept: int = setting(
        2, "checkpoints of a training run kept on disk; two survive damage to the newest", ge=1
    )
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
class DpoConfig(TrainingConfig):
    """Direct preference optimisation of the teacher (arXiv 2305.18290)."""

    learning_rate: float = setting(1e-6, "peak learning rate", gt=0)
    final_learning_rate: float = setting(1e-9, "learning rate at the end of the decay", ge=0)
    batch_size: int = setting(2, "pairs an optimizer step", ge=1)
    micro_batch: int = setting(2, "pairs on a device at one time", ge=1)
    beta: float = setting(0.1, "strength of the tie to the reference policy", gt=0)
    loss: Literal["sigmoid", "ipo"] = setting("sigmoid", "DPO's loss, or IPO's (arXiv 2310.12036)")
    label_smoothing: float = setting(
        0.0, "sigmoid: assumed share of pairs the wrong way round", ge=0, lt=0.5
    )
    length_normalized: bool = setting(False, "log-probs a token instead of a sequence")
    keep_every: int = setting(
        0, "steps between teachers kept as folders, teachers/step-N/teacher; 0: only the last", ge=0
    )

    @model_validator(mode="after")
    def _loss_reads_its_settings(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to the loss 'sigmoid', not to 'ipo'")
        return self
