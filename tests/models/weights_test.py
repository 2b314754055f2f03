"""Parity with transformers in both directions, and one error for each kind of bad weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.models.families import conversion_table, family_of
from montessori_jax.models.folder import save_folder
from montessori_jax.models.rope import rotation
from montessori_jax.models.weights import from_params, stored_shapes, to_params
from tests.models.tiny import (
    CONFIG,
    LINEAR,
    LLAMA3,
    jax_logits,
    relative_error,
    state,
    tokens_for,
    torch_logits,
    torch_model,
)

VARIATIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim 16": {"head_dim": 16},
    "head_dim of width": {"head_dim": 6},
    "no head_dim": {"head_dim": None},
    "all heads": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "rope base": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": LINEAR},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3, low": {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}},
    "llama3, high": {"rope_scaling": LLAMA3 | {"high_freq_factor": 16.0}},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 0.5},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "one layer": {"num_hidden_layers": 1},
    "widths": {"hidden_size": 32, "intermediate_size": 16, "vocab_size": 97},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_agree_both_ways_and_tensors_round_trip_bit_for_bit(name: str, tmp_path: Path):
    config_json = CONFIG | VARIATIONS[name]
    theirs = torch_model(config_json)
    tokens = tokens_for(config_json)
    expected = torch_logits(theirs, tokens)
    config = family_of(config_json, "test")

    params = to_params(config, state(theirs))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    found = jax_logits(Model(config), params, tokens)
    assert relative_error(found, expected) < 1e-5

    back = dict(from_params(config, params))
    assert back.keys() == state(theirs).keys()
    for key, array in state(theirs).items():
        assert back[key].tobytes() == array.tobytes(), key

    save_folder(tmp_path / "out", Model(config), params, None, {"eos_token_id": 2})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = torch_logits(loaded, tokens)
    if name == "gelu_new":  # exported as gelu_pytorch_tanh: the same formula, rounded otherwise
        assert relative_error(again, expected) < 1e-6
    else:
        assert np.array_equal(again, expected)


def test_variations_differ():
    """Otherwise a field that nothing reads would agree with transformers by accident."""
    names = "plain|rope base|linear|llama3|llama3, low|llama3, high|epsilon|gelu|gelu tanh|relu"
    seen = []
    for name in names.split("|"):
        config_json = CONFIG | VARIATIONS[name]
        seen.append(torch_logits(torch_model(config_json), tokens_for(config_json)))
    for index, one in enumerate(seen):
        for other in seen[:index]:
            assert relative_error(one, other) > 2e-5


def test_llama3_scaling_agrees_far_past_the_original_length():
    config_json = CONFIG | {
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
        "head_dim": 64,
        "max_position_embeddings": 131072,
    }
    theirs = torch_model(config_json)
    tokens = tokens_for(config_json, rows=1)
    positions = np.linspace(0, 131071, tokens.shape[1]).astype(np.int64)[None]
    config = family_of(config_json, "test")
    found = jax_logits(Model(config), to_params(config, state(theirs)), tokens, positions)
    assert relative_error(found, torch_logits(theirs, tokens, positions)) < 1e-5


def test_float64_agrees_to_float64_precision(monkeypatch: pytest.MonkeyPatch):
    def forward(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, True) + norm.variance_epsilon)

    def turn(_: torch.nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple:
        return tuple(
            torch.tensor(np.asarray(part)).double().repeat(1, 1, 2)
            for part in rotation(config, jnp.asarray(position_ids.numpy(), jnp.int32))
        )

    config = family_of(CONFIG, "test")
    # transformers rounds to float32 in its norms whatever the model's dtype; and its float32
    # cosines differ from ours in the last bit (rope_test holds ours to the true ones).
    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", turn)
    theirs = torch_model(CONFIG)
    tokens = tokens_for(CONFIG)
    tensors = state(theirs)
    expected = torch_logits(theirs.double(), tokens)
    with jax.enable_x64(True):
        params = to_params(config, tensors, dtype=jnp.float64)
        model = Model(config)
        ones = np.ones_like(tokens, np.int32)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        hidden = model.hidden(params, tokens, ones, positions, dtype=jnp.float64)
        found = np.asarray(hidden @ model.head(params))
    assert found.dtype == np.float64
    assert relative_error(found, expected) < 1e-13


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_narrow_tensors_are_widened_exactly(dtype):
    config = family_of(CONFIG, "test")
    tensors = {name: array.astype(dtype) for name, array in state(torch_model(CONFIG)).items()}
    for name, array in from_params(config, to_params(config, tensors)):
        assert array.dtype == np.float32
        assert np.array_equal(array, tensors[name].astype(np.float32)), name


def test_parameters_come_in_another_dtype_if_asked_for():
    config = family_of(CONFIG, "test")
    tensors = state(torch_model(CONFIG))
    params = to_params(config, tensors, dtype=jnp.bfloat16)
    for name, array in from_params(config, params):
        assert np.array_equal(array, tensors[name].astype(ml_dtypes.bfloat16)), name


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True},
                                     {"mlp_bias": True}])  # fmt: skip
def test_the_table_covers_every_parameter_once_and_transformers_tensors(changes: dict):
    config = family_of(CONFIG | changes, "test")
    paths = [tuple(row.path) for row in conversion_table(config)]
    leaves = jax.tree_util.tree_leaves_with_path(Model(config).shapes())
    assert sorted(paths) == sorted(tuple(key.key for key in path) for path, _ in leaves)
    theirs = {name: array.shape for name, array in state(torch_model(CONFIG | changes)).items()}
    assert stored_shapes(config) == theirs


def test_export_refuses_a_tree_of_another_configuration():
    config = family_of(CONFIG, "test")
    other = Model(family_of(CONFIG | {"hidden_size": 32}, "test")).init(jax.random.key(0))
    with pytest.raises(ValueError, match="do not belong"):
        next(from_params(config, other))


class TestErrors:
    config = family_of(CONFIG, "test")

    def tensors(self) -> dict[str, np.ndarray]:
        return state(torch_model(CONFIG))

    def refused(self, tensors: dict[str, np.ndarray], **changes: object) -> str:
        config = family_of(CONFIG | changes, "test")
        with pytest.raises(UserError) as caught:
            to_params(config, tensors, origin="some/folder")
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("some/folder: ")
        return message

    def test_missing(self):
        tensors = self.tensors()
        del tensors["model.layers.1.mlp.up_proj.weight"]
        assert "missing tensors: model.layers.1.mlp.up_proj.weight" in self.refused(tensors)

    def test_missing_lists_three_and_counts_the_rest(self):
        tensors = {name: a for name, a in self.tensors().items() if "layers.2" not in name}
        message = self.refused(tensors)
        assert message.count("model.layers.2") == 3
        assert message.endswith("and 6 more")  # 9 tensors a layer

    def test_unknown(self):
        extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
        message = self.refused(self.tensors() | extra)
        assert "unknown tensors: model.layers.0.self_attn.q_norm.weight" in message

    def test_more_layers_than_the_configuration_says(self):
        assert "unknown tensors: model.layers.2." in self.refused(
            self.tensors(), num_hidden_layers=2
        )

    def test_biases_that_the_configuration_does_not_mention(self):
        tensors = state(torch_model(CONFIG | {"attention_bias": True}))
        assert "unknown tensors: model.layers.0.self_attn.k_proj.bias" in self.refused(tensors)

    def test_misshapen(self):
        tensors = self.tensors()
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((24, 40), np.float32)
        message = self.refused(tensors)
        assert "model.layers.1.mlp.up_proj.weight is [24, 40], the configuration says [40, 24]" in (
            message
        )

    def test_missing_and_unknown_are_told_together(self):
        tensors = {name.removeprefix("model."): a for name, a in self.tensors().items()}
        message = self.refused(tensors)
        assert "missing tensors: model.embed_tokens.weight" in message
        assert "unknown tensors: embed_tokens.weight" in message

    def test_tied_model_with_an_equal_head_is_fine(self):
        tied = family_of(CONFIG | {"tie_word_embeddings": True}, "test")
        tensors = state(torch_model(CONFIG | {"tie_word_embeddings": True}))
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
        params = to_params(tied, tensors | head)
        assert "head" not in params

    def test_tied_model_with_another_head_is_refused(self):
        message = self.refused(self.tensors(), tie_word_embeddings=True)
        assert "lm_head.weight differs from model.embed_tokens.weight" in message

    def test_untied_model_needs_its_head(self):
        tensors = self.tensors()
        del tensors["lm_head.weight"]
        assert "missing tensors: lm_head.weight" in self.refused(tensors)

    def test_rotary_buffers_are_ignored(self):
        buffers = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            "model.rotary_emb.inv_freq": np.ones(4, np.float32),
        }
        to_params(self.config, self.tensors() | buffers)

    def test_integers_are_refused(self):
        tensors = self.tensors()
        tensors["model.norm.weight"] = np.ones(24, np.int8)
        assert "model.norm.weight is stored as int8" in self.refused(tensors)

    def test_float8_is_refused(self):
        tensors = self.tensors()
        tensors["model.norm.weight"] = np.ones(24, ml_dtypes.float8_e4m3fn)
        assert "float8_e4m3fn" in self.refused(tensors)


def test_config_json_of_an_export_is_valid_json_with_every_size(tmp_path: Path):
    config = family_of(CONFIG, "test")
    params = Model(config).init(jax.random.key(0))
    save_folder(tmp_path / "out", Model(config), params, None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in CONFIG if key not in ("bos_token_id", "eos_token_id")} == {
        key: CONFIG[key] for key in CONFIG if key not in ("bos_token_id", "eos_token_id")
    }
    assert written["bos_token_id"] is None  # none was given: transformers must not assume one
