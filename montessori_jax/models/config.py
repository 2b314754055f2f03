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

    Attributes:
        local_rope_theta: RoPE base of the sliding layers, unscaled; None: the same as the others'.
        zero_centered_norms: norms multiply by ``1 + scale`` and start at zero.
        qk_norm: queries and keys are normed head by head before their rotation.
        post_norms: attention's and the feed-forward's results are normed before they are added.
        scale_embeddings: embeddings are multiplied by ``sqrt(hidden_size)``.
        query_pre_attn_scalar: scores are divided by its root; None: by that of ``head_dim``.
        attention_soft_cap: scores ``x`` become ``cap tanh(x / cap)``.
        logit_soft_cap: likewise the logits.
        sliding_window: tokens that a sliding layer sees, itself included; None: none slides.
        sliding_layers: which layers slide, repeated over the layers.
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
    local_rope_theta: float | None = None
    rms_norm_eps: float = 1e-6
    zero_centered_norms: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    scale_embeddings: bool = False
    query_pre_attn_scalar: int | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = (True,)
    initializer_range: float = 0.02

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Of each layer, whether it sees its window alone."""
        if self.sliding_window is None:
            return (False,) * self.num_layers
        period = len(self.sliding_layers)
        return tuple(self.sliding_layers[layer % period] for layer in range(self.num_layers))
