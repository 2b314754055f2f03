"""Tiny random models made by transformers: the independent side of the parity tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from montessori_jax.models import Model, Params

# As transformers 4 wrote it. Grouped heads, and a head dimension that is not width / heads.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "torch_dtype": "float32",
    "use_cache": True,
}
# Our layers' matrices by their Hugging Face names, by hand; torch keeps them transposed, as
# [outputs, inputs].
MATRICES = {
    "self_attn.q_proj": ("attention", "query"),
    "self_attn.k_proj": ("attention", "key"),
    "self_attn.v_proj": ("attention", "value"),
    "self_attn.o_proj": ("attention", "out"),
    "mlp.gate_proj": ("mlp", "gate"),
    "mlp.up_proj": ("mlp", "up"),
    "mlp.down_proj": ("mlp", "down"),
}
LINEAR = {"type": "linear", "factor": 3.0}
# CONFIG's wavelengths are 6.3, 63, 628 and 6,283 positions: one is kept (below 80 / 4), one lies on
# the ramp (below 80), two are divided. Rows of 96 go past the original length.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 80,
}
# The shape of CONFIG in every family, with windows of 9 in some layers and soft caps that bite.
SHARED = {key: v for key, v in CONFIG.items() if key not in ("attention_bias", "mlp_bias")}
GEMMA = {key: v for key, v in SHARED.items() if key != "hidden_act"} | {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "sliding_window": 9,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 5,
    "final_logit_softcapping": 3.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "mistral": SHARED
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9},
    "qwen2": SHARED
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3": SHARED
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "gemma2": GEMMA
    | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 1.5,
    },
    "gemma3_text": GEMMA
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": 50000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 2,
    },
}


def torch_config(config: dict[str, Any]) -> PreTrainedConfig:
    """transformers' configuration, of the family's class."""
    settings = json.loads(json.dumps(config))
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def torch_model(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A float32 model of ``config`` with every tensor random, norms and biases too."""
    model = AutoModelForCausalLM.from_config(torch_config(config)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    centre = 0 if config["model_type"].startswith("gemma") else 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + 0.3 * noise if "norm" in name else 0.3 * noise)
    return model


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint of ``model`` holds."""
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def torch_logits(
    model: torch.nn.Module, tokens: np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """Logits ``[rows, length, vocab]`` by transformers.

    The mask is given, for without one it takes a jump in the positions for a new sample.
    """
    places = None if positions is None else torch.tensor(positions)
    ids = torch.tensor(tokens)
    with torch.no_grad():
        return model(
            ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=False
        ).logits.numpy()


def jax_logits(
    model: Model, params: Params, tokens: np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """Logits ``[rows, length, vocab]`` by ours, a sample a row."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(
        params, tokens.astype(np.int32), np.ones_like(tokens, np.int32), positions.astype(np.int32)
    )
    return np.asarray(model.logits(params, hidden))


def tokens_for(config: dict[str, Any], rows: int = 2, length: int = 96) -> np.ndarray:
    """Random token ids, the same each time."""
    return np.random.default_rng(7).integers(0, config["vocab_size"], (rows, length))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tokenizer(size: int = 61) -> PreTrainedTokenizerFast:
    """One token a word: ``w0 w1 ...``, the first three special."""
    vocabulary = {f"w{index}": index for index in range(size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", bos_token="w1", eos_token="w2"
    )


def write_folder(folder: Path, config: dict[str, Any], seed: int = 0, **options: Any) -> Path:
    """A model folder written by transformers, with a tokenizer."""
    torch_model(config, seed).save_pretrained(folder, **options)
    tokenizer(config["vocab_size"]).save_pretrained(folder)
    return folder
