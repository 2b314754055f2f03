"""Which floating point type a stage computes in, and which a model is loaded in."""

import jax

from montessori_jax.config import EvaluationConfig, SamplingConfig


def compute_dtype(dtype: str) -> str:
    """What ``auto`` stands for: bfloat16 on GPU and TPU, float32 on a CPU, which is slower in
    bfloat16; any other name is itself."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def forward_dtype(*settings: SamplingConfig | EvaluationConfig) -> str:
    """Dtype to load a model in that is only run forward: bfloat16 where every use computes in it.

    Layers are cast to the compute dtype as they are used, so loading them in it halves the memory
    and changes nothing.
    """
    narrow = all(compute_dtype(one.dtype) == "bfloat16" for one in settings)
    return "bfloat16" if narrow else "float32"
