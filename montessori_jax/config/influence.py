"""How influence is measured, and what is made of it."""

from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting
from montessori_jax.config.training import ATTENTION_HELP, Attention


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
    block: int = setting(
        0, "candidates probed side by side on a device; 0 chooses from memory", ge=0
    )
    max_length: int = setting(1024, "longest sample in tokens; the response is cut there", ge=8)
    row_length: int = setting(0, "tokens a packed reference row; 0 chooses", ge=0)
    rows_per_pass: int = setting(4, "reference rows on a device at one time", ge=1)
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
