"""Published models: each config.json is read without a warning, sized as known, written back."""

import pytest

from montessori_jax.models import Model
from montessori_jax.models.config import RopeScaling
from montessori_jax.models.families import family_of, to_hf_config
from tests.models.tiny import torch_config

# The published files of the models that must load, less what is in COMMON.
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "use_cache": True,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False,
}  # fmt: skip
PUBLISHED = {
    "Llama-2-7b": COMMON
    | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "hidden_size": 4096, "vocab_size": 32000,
       "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
       "num_hidden_layers": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
       "torch_dtype": "float16", "transformers_version": "4.31.0.dev0"},
    "TinyLlama-1.1B": COMMON
    | {"hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
       "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
       "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
       "transformers_version": "4.35.0", "vocab_size": 32000},
    "Llama-3-8B": COMMON
    | {"attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128009,
       "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
       "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
       "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256},
    "Llama-3.2-1B": COMMON
    | {"attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
       "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
       "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
       "num_hidden_layers": 16, "num_key_value_heads": 8,
       "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
       "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256},
    "SmolLM2-135M": COMMON
    | {"attention_dropout": 0.0, "hidden_size": 576, "initializer_range": 0.041666666666666664,
       "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
       "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
       "num_key_value_heads": 3, "pad_token_id": 2, "rope_interleaved": False,
       "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
       "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "vocab_size": 49152},
    "Mistral-7B-v0.1": MISTRAL | {"sliding_window": 4096, "vocab_size": 32000,
                                  "rope_theta": 10000.0},
    "Mistral-7B-v0.3": MISTRAL | {"sliding_window": None, "vocab_size": 32768,
                                  "rope_theta": 1000000.0},
    "Qwen1.5-7B": QWEN
    | {"hidden_size": 4096, "intermediate_size": 11008, "max_window_layers": 28,
       "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
       "sliding_window": 32768, "vocab_size": 151936, "rms_norm_eps": 1e-6},
    "Qwen2.5-0.5B": QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
       "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
       "sliding_window": 32768, "vocab_size": 151936, "rms_norm_eps": 1e-6, "use_mrope": False,
       "tie_word_embeddings": True},
    "Qwen3-0.6B": QWEN
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
       "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
       "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
       "rope_scaling": None, "sliding_window": None, "vocab_size": 151936, "rms_norm_eps": 1e-6,
       "tie_word_embeddings": True},
    "gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
        "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 16,
        "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000},
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 262144},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_without_a_warning_and_written_back(name: str):
    config = family_of(PUBLISHED[name], name)
    assert family_of(to_hf_config(config), name) == config


def test_published_models_have_their_known_sizes():
    config = family_of(PUBLISHED["Llama-3.2-1B"], "x")
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (64, 8, 500000.0)
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert family_of(PUBLISHED["Llama-2-7b"], "x").head_dim == 128
    assert family_of(PUBLISHED["Llama-2-7b"], "x").rope_theta == 10000.0  # older than the key
    smol = family_of(PUBLISHED["SmolLM2-135M"], "x")
    assert smol.head_dim == 64
    assert smol.tie_word_embeddings
    assert smol.initializer_range == 1 / 24
    assert family_of(PUBLISHED["Mistral-7B-v0.1"], "x").sliding == (True,) * 32
    assert family_of(PUBLISHED["Mistral-7B-v0.3"], "x").sliding_window is None
    qwen = family_of(PUBLISHED["Qwen2.5-0.5B"], "x")
    assert (qwen.qkv_bias, qwen.out_bias, qwen.sliding_window, qwen.head_dim) == (1, 0, None, 64)
    assert family_of(PUBLISHED["Qwen3-0.6B"], "x").qk_norm
    gemma = family_of(PUBLISHED["gemma-2-9b"], "x")
    assert gemma.tie_word_embeddings
    assert (gemma.attention_soft_cap, gemma.logit_soft_cap) == (50.0, 30.0)
    assert gemma.sliding == (True, False) * 21
    gemma = family_of(PUBLISHED["gemma-3-1b"], "x")
    assert gemma.sliding == ((True,) * 5 + (False,)) * 4 + (True, True)
    assert gemma.sliding_layers == (True,) * 5 + (False,)
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1e6, 1e4)


# Parameters as their publishers count them, rounded to millions; embeddings once where tied.
MILLIONS = {"Llama-2-7b": 6738, "TinyLlama-1.1B": 1100, "Llama-3-8B": 8030, "Llama-3.2-1B": 1236,
            "SmolLM2-135M": 135, "Mistral-7B-v0.1": 7242, "Mistral-7B-v0.3": 7248,
            "Qwen1.5-7B": 7721, "Qwen2.5-0.5B": 494, "Qwen3-0.6B": 596, "gemma-2-9b": 9242,
            "gemma-3-1b": 1000}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_known_numbers_of_parameters(name: str):
    count = Model(family_of(PUBLISHED[name], name)).parameter_count()
    assert round(count / 1e6) == MILLIONS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_is_written(name: str):
    config = family_of(PUBLISHED[name], name)
    ids = {"bos_token_id": 5, "eos_token_id": [6, 7]}
    written = to_hf_config(config, dtype="bfloat16", token_ids=ids)
    theirs = torch_config(written)
    assert family_of(theirs.to_dict(), name) == config
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (5, [6, 7], None)
    assert "bfloat16" in str(theirs.dtype)
