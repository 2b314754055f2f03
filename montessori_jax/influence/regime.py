"""What the settings of influence stand for: presets, methods, kernels."""

from dataclasses import replace
from typing import Any, cast

from montessori_jax.config import InfluenceConfig

# Estimators that differentiate in forward mode, which fused attention kernels do not have.
FORWARD = ("control_variate", "linearized", "second_order")


def resolved(settings: InfluenceConfig) -> InfluenceConfig:
    """Settings with their preset applied.

    ``original`` is the regime of Montessori-Instruct's public code: gradients divided by its 8
    devices, the reference loss a mean over batches of 8, parameters, moments and products in bf16,
    and a difference of two losses unless another method is named.
    """
    if settings.preset != "original":
        return settings
    return replace(
        settings,
        method="exact" if settings.method == "auto" else settings.method,
        gradient_scale=1 / 8,
        reference_reduction="batch8",
        precision="bfloat16",
    )


def label(settings: InfluenceConfig) -> str:
    """What scores are called: the method, and what of its numerics is not as it should be."""
    if settings.preset == "original":
        return f"{settings.method} (preset original, {settings.precision})"
    plain = settings.precision == "float32"
    return settings.method if plain else f"{settings.method} ({settings.precision})"


def with_method(settings: InfluenceConfig, method: str) -> InfluenceConfig:
    """The same settings for a method by name."""
    return replace(settings, method=cast(Any, method))


def attention_of(settings: InfluenceConfig, dtype: str | None = None) -> str:
    """The attention kernel of what is computed in ``dtype``; by default ``settings.precision``.

    Forward mode needs ``xla``, and so does what a run in bf16 computes in float32 all the same:
    cuDNN has no float32.
    """
    narrow = settings.attention == "cudnn" and settings.precision == "bfloat16"
    if settings.method in FORWARD or (narrow and dtype == "float32"):
        return "xla"
    return settings.attention
