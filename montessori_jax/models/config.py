"""What a decoder is made of, apart from its numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training length.

    ``kind`` is ``linear`` (every frequency divided by ``factor``) or ``llama3`` (low frequencies
    divided, high ones kept, a ramp between; Llama 3.1's rule, which also reads the last three).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of one decoder-only transformer; hashable, so that jit can key on it.

    A family (``montessori_jax.models.families``) makes one from a Hugging Face ``config.json``.
    Widths and counts are in units of features, heads and layers.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    initializer_range: float = 0.02
