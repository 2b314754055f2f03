"""What a config.json means: both generations of files, every field, and every refusal."""

import json
import warnings
from dataclasses import fields, replace

import pytest
from transformers import AutoConfig, LlamaConfig

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig, RopeScaling
from montessori_jax.models.families import FAMILIES, HARMLESS, family_of, to_hf_config
from tests.models.tiny import CONFIG, LINEAR, LLAMA3, torch_config
from tests.models.tiny import FAMILIES as FAMILY_FILES


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_both_generations_of_files_mean_the_same(scaling: dict | None):
    old = CONFIG | {"rope_theta": 5e5, "rope_scaling": scaling}
    settings = {key: value for key, value in old.items() if key != "model_type"}
    new = LlamaConfig(**json.loads(json.dumps(settings))).to_dict()
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    assert family_of(new, "new") == family_of(old, "old")


@pytest.mark.parametrize("name", FAMILY_FILES)
def test_every_field_of_transformers_configuration_is_read_or_known(name: str):
    """A field that a later transformers adds must be looked at, not slip through."""
    family_of(AutoConfig.for_model(name).to_dict(), "x")


# One other value for each field that a family has words for.
SIZES = {
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
    "hidden_act": "relu",
    "initializer_range": 0.03,
}
WINDOWS = {"sliding_window": 10, "sliding_layers": (True, True, False)}
GEMMA = SIZES | WINDOWS | {"tie_word_embeddings": False, "query_pre_attn_scalar": 6,
                           "logit_soft_cap": None, "qkv_bias": True}  # fmt: skip
OTHER = {
    "llama": SIZES | {"tie_word_embeddings": True, "qkv_bias": True, "mlp_bias": True},
    "mistral": SIZES | {"tie_word_embeddings": True, "sliding_window": 10},
    "qwen2": SIZES | WINDOWS | {"tie_word_embeddings": True},
    "qwen3": SIZES | {"tie_word_embeddings": False, "qkv_bias": True},
    "gemma2": GEMMA | {"attention_soft_cap": 4.0},
    "gemma3_text": GEMMA | {"local_rope_theta": 101.0, "rope_scaling": None},
}
# What follows from the family, or from the field before it.
FIXED = {"family", "zero_centered_norms", "post_norms", "qk_norm", "scale_embeddings"}


@pytest.mark.parametrize("name", OTHER)
def test_every_field_goes_out_and_comes_back(name: str):
    config = family_of(FAMILY_FILES[name], "x")
    for field in (field.name for field in fields(ModelConfig)):
        if field not in OTHER[name]:
            continue
        value = OTHER[name][field]
        assert getattr(config, field) != value, field
        # Gemma's and Qwen3's files have one key for all four biases of attention.
        both = {"out_bias": True} if field == "qkv_bias" else {}
        changed = replace(config, **{field: value}, **both)
        again = family_of(to_hf_config(changed), "x")
        assert again == replace(changed, sliding_layers=again.sliding_layers), field
        assert again.sliding == changed.sliding, field


def test_every_field_is_varied_in_some_family():
    varied = {field for other in OTHER.values() for field in other} | FIXED | {"out_bias"}
    assert varied == {field.name for field in fields(ModelConfig)}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "sliding_window", 8),
        ("llama", "qk_norm", True),
        ("llama", "out_bias", True),  # without the other three
        ("mistral", "qkv_bias", True),
        ("mistral", "sliding_layers", (True, False)),
        ("qwen2", "qkv_bias", False),
        ("qwen3", "attention_soft_cap", 5.0),
        ("gemma2", "local_rope_theta", 5.0),
        ("gemma2", "scale_embeddings", False),
        ("gemma3_text", "attention_soft_cap", 5.0),
    ],
)
def test_what_a_file_cannot_say_is_not_written(name: str, field: str, value: object):
    config = replace(family_of(FAMILY_FILES[name], "x"), **{field: value})
    with pytest.raises(ValueError, match=f"config.json of {name} cannot express {field}"):
        to_hf_config(config)


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


LINEAR_PARAMETERS = {"rope_type": "linear", "factor": 3.0}
REFUSED = [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama"),
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


# Of the other families, what is theirs.
FAMILY_REFUSED = [
    ("mistral", {"num_key_value_heads": ...}, "'num_key_value_heads' is missing"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "'layer_types' other than sliding"),
    ("mistral", {"sliding_window": 0}, "'sliding_window' is 0"),
    ("qwen2", {"layer_types": ["full_attention"]}, "a list of 3"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "alone"),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}, "no window"),
    ("qwen2", {"max_window_layers": -1}, "'max_window_layers' is -1"),
    ("qwen2", {"use_mrope": True}, "'use_mrope' is True"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE type 'yarn'"),
    ("qwen3", {"head_dim": ...}, "'head_dim' is missing"),
    ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
    ("gemma2", {"sliding_window_size": 8}, "'sliding_window_size' is 8"),
    ("gemma2", {"final_logit_softcapping": 0}, "'final_logit_softcapping' is 0"),
    ("gemma2", {"hidden_activation": "quick_gelu"}, "'hidden_activation' is 'quick_gelu'"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
    ("gemma3_text", {"sliding_window": None}, "there is no window"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
    (
        "gemma3_text",
        {"rope_scaling": None, "rope_parameters": {"sliding_attention": LINEAR_PARAMETERS}},
        "'rope_parameters.sliding_attention.rope_type' is 'linear'",
    ),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "differ"),
]


@pytest.mark.parametrize(("name", "changes", "part"), FAMILY_REFUSED, ids=str)
def test_refusals_of_families_are_one_line_too(name: str, changes: dict, part: str):
    values = {k: v for k, v in (FAMILY_FILES[name] | changes).items() if v is not ...}
    with pytest.raises(UserError) as caught:
        family_of(values, "dir/config.json")
    message = str(caught.value)
    assert part in message
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message


@pytest.mark.parametrize("name", FAMILY_FILES)
def test_both_generations_of_files_mean_the_same_in_every_family(name: str):
    new = torch_config(FAMILY_FILES[name]).to_dict()
    assert family_of(new, "new") == family_of(FAMILY_FILES[name], "old")


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
