"""What a config.json means: both generations of files, published models, and every refusal."""

import json
import warnings
from dataclasses import fields, replace

import pytest
from transformers import LlamaConfig

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig, RopeScaling
from montessori_jax.models.families import FAMILIES, HARMLESS, family_of, to_hf_config
from tests.models.tiny import CONFIG, LINEAR, LLAMA3

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


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_both_generations_of_files_mean_the_same(scaling: dict | None):
    old = CONFIG | {"rope_theta": 5e5, "rope_scaling": scaling}
    settings = {key: value for key, value in old.items() if key != "model_type"}
    new = LlamaConfig(**json.loads(json.dumps(settings))).to_dict()
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    assert family_of(new, "new") == family_of(old, "old")


def test_every_field_of_transformers_configuration_is_read_or_known():
    """A field that a later transformers adds must be looked at, not slip through."""
    family_of(LlamaConfig().to_dict(), "x")


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_is_written(name: str):
    config = family_of(PUBLISHED[name], name)
    ids = {"bos_token_id": 5, "eos_token_id": [6, 7]}
    written = to_hf_config(config, dtype="bfloat16", token_ids=ids)
    theirs = LlamaConfig(**json.loads(json.dumps(written)))
    assert family_of(theirs.to_dict(), name) == config
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (5, [6, 7], None)
    assert "bfloat16" in str(theirs.dtype)


# One other value for each field, and the config.json key it comes from.
OTHER = {
    "vocab_size": 62,
    "hidden_size": 48,
    "intermediate_size": 41,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 129,
    "rope_theta": 10001.0,
    "rope_scaling": RopeScaling("linear", 2.0),
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "relu",
    "initializer_range": 0.03,
}


def test_every_field_goes_out_and_comes_back():
    config = family_of(CONFIG, "x")
    assert OTHER.keys() | {"family"} == {field.name for field in fields(ModelConfig)}
    for name, value in OTHER.items():
        assert getattr(config, name) != value
        changed = replace(config, **{name: value})
        assert family_of(to_hf_config(changed), "x") == changed, name


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 9.0, 1.5, 3.0, 4096),
        RopeScaling("linear", 2.5),
    ],
)
def test_every_field_of_the_scaling_goes_out_and_comes_back(scaling: RopeScaling):
    config = replace(family_of(CONFIG, "x"), rope_scaling=scaling)
    assert family_of(to_hf_config(config), "x") == config


def test_original_length_is_found_where_transformers_finds_it():
    scaling = {key: v for key, v in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = family_of(CONFIG | {"rope_scaling": scaling}, "x")
    assert config.rope_scaling.original_max_position_embeddings == 128  # max_position_embeddings
    settings = {key: value for key, value in CONFIG.items() if key != "model_type"}
    theirs = LlamaConfig(**settings | {"rope_scaling": dict(scaling)}).rope_parameters
    assert theirs["original_max_position_embeddings"] == 128


REFUSED = [
    ({"model_type": "mistral"}, "model_type 'mistral' is not supported; supported: llama"),
    ({"model_type": None, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ({"model_type": None, "architectures": None}, "(none given)"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE type 'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE type 'longrope'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "'rope_scaling.factor' is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'rope_scaling.low_freq_factor'"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "must be above 'low_freq_factor'"),
    ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor' is 0.5"),
    ({"rope_scaling": [1, 2]}, "'rope_scaling' is [1, 2], expected a mapping"),
    ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3}, "differ"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs by layer"),
    (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 77},
        "'original_max_position_embeddings' is 77, which is not supported here (only 80)",
    ),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ({"rope_interleaved": True}, "'rope_interleaved' is True"),
    ({"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'"),
    ({"sliding_window": 4096}, "'sliding_window' is 4096"),
    ({"use_sliding_window": True}, "'use_sliding_window' is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config'"),
    ({"vocab_size": None}, "'vocab_size' is missing"),
    ({"hidden_size": "24"}, "'hidden_size' is '24', expected a whole number above 0"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
    ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
    ({"rms_norm_eps": -1e-5}, "'rms_norm_eps' is -1e-05, expected a number above 0"),
    ({"rope_theta": float("inf")}, "'rope_theta' is inf"),
    ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1, expected true or false"),
    ({"num_key_value_heads": 3}, "no multiple of 'num_key_value_heads' (3)"),
    ({"head_dim": 7}, "'head_dim' is 7"),
]


@pytest.mark.parametrize(("changes", "part"), REFUSED, ids=[part for _, part in REFUSED])
def test_refusals_are_one_line_that_names_the_field_and_the_file(changes: dict, part: str):
    with pytest.raises(UserError) as caught:
        family_of(CONFIG | changes, "dir/config.json")
    message = str(caught.value)
    assert part in message
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message


def test_width_that_heads_do_not_divide_needs_a_head_dim():
    odd = {key: v for key, v in CONFIG.items() if key != "head_dim"} | {"hidden_size": 26}
    with pytest.raises(UserError, match="there is no 'head_dim'"):
        family_of(odd, "x")
    with pytest.raises(UserError, match="there is no 'head_dim'"):
        family_of(odd | {"head_dim": None}, "x")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"rope_scaling": LINEAR | {"attention_factor": 2.0}}, "rope_scaling.attention_factor"),
        ({"attention_dropout": 0.1}, "applies no dropout"),
    ],
)
def test_keys_that_might_matter_are_warned_of_by_name(changes: dict, named: str):
    with pytest.warns(UserWarning, match=named):
        family_of(CONFIG | changes, "x")


def test_null_and_harmless_keys_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family_of(CONFIG | dict.fromkeys(HARMLESS - CONFIG.keys(), 1) | {"surprise": None}, "x")


def test_architecture_alone_is_enough():
    plain = {key: value for key, value in CONFIG.items() if key != "model_type"}
    assert family_of(plain, "x") == family_of(CONFIG, "x")


def test_families_are_keyed_by_their_model_type():
    assert all(key == family.model_type for key, family in FAMILIES.items())
