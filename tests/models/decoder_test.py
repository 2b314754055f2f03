"""The decoder as a pure function: packing, caches, dtypes, recomputation, derivatives, fields."""

from dataclasses import fields, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.models import Model, ModelConfig, RopeScaling
from montessori_jax.models.families import family_of
from tests.models.tiny import CONFIG, jax_logits, relative_error, tokens_for

BASE = family_of(CONFIG | {"attention_bias": True, "mlp_bias": True}, "x")
# Everything that any family has, at once.
RICH = replace(
    BASE,
    local_rope_theta=100.0,
    zero_centered_norms=True,
    qk_norm=True,
    post_norms=True,
    scale_embeddings=True,
    query_pre_attn_scalar=5,
    attention_soft_cap=1.0,
    logit_soft_cap=2.0,
    sliding_window=6,
    sliding_layers=(True, False),
)


def random_params(config: ModelConfig, seed: int = 0):
    """Every leaf random and of size one tenth to one, biases and norms too."""
    leaves, tree = jax.tree.flatten(Model(config).shapes())
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, drawn)


def packed_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two rows of 24: samples of 7, 9 and 5 tokens with 3 of padding, and one of 24."""
    tokens = tokens_for(CONFIG, rows=2, length=24).astype(np.int32)
    segments = np.array([[1] * 7 + [2] * 9 + [3] * 5 + [0] * 3, [1] * 24], np.int32)
    positions = np.array([[*range(7), *range(9), *range(5), *range(3)], [*range(24)]], np.int32)
    return tokens, segments, positions


def test_parameters_are_a_plain_tree_of_float32_stacked_by_layer():
    model = Model(BASE)
    params = model.init(jax.random.key(0))
    assert type(params) is dict
    assert type(params["layers"]) is dict
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), model.shapes()
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert params["layers"]["attention"]["query"]["kernel"].shape == (3, 24, 32)
    assert params["layers"]["attention"]["key"]["bias"].shape == (3, 16)
    with jax.enable_x64(True):
        wide_init = model.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(wide_init)} == {jnp.dtype(jnp.float32)}


def test_parameter_count_by_hand():
    attention = 24 * 32 * 2 + 24 * 16 * 2 + 32 + 16 + 16 + 24
    mlp = 3 * 24 * 40 + 40 + 40 + 24
    assert Model(BASE).parameter_count() == 61 * 24 * 2 + 24 + 3 * (attention + mlp + 2 * 24)


def test_initialisation_is_normal_with_the_range_asked_for_and_differs_by_layer():
    params = Model(replace(BASE, initializer_range=0.03)).init(jax.random.key(1))
    kernel = np.asarray(params["layers"]["mlp"]["gate"]["kernel"])
    assert kernel.std() == pytest.approx(0.03, rel=0.05)
    assert np.asarray(params["embed"]["embedding"]).std() == pytest.approx(0.03, rel=0.1)
    assert not np.allclose(kernel[0], kernel[1])
    assert np.all(np.asarray(params["norm"]["scale"]) == 1)
    assert np.all(np.asarray(params["layers"]["attention"]["out"]["bias"]) == 0)


def test_equal_configurations_make_equal_models():
    assert Model(BASE) == Model(replace(BASE))
    assert hash(Model(BASE)) == hash(Model(replace(BASE)))
    assert Model(BASE) != Model(replace(BASE, rope_theta=1.0))


# For each field another value, and what it must change: the numbers, the parameters' shapes or
# the fresh parameters. `max_position_embeddings` limits nothing here; the export writes it
# (families_test), as it does the family's name.
FIELDS = {
    "vocab_size": (62, "shapes"),
    "hidden_size": (26, "shapes"),
    "intermediate_size": (41, "shapes"),
    "num_layers": (2, "shapes"),
    "num_heads": (8, "shapes"),
    "num_kv_heads": (4, "shapes"),
    "head_dim": (10, "shapes"),
    "rope_theta": (500.0, "logits"),
    "rope_scaling": (RopeScaling("linear", 2.0), "logits"),
    "rms_norm_eps": (1e-2, "logits"),
    "tie_word_embeddings": (True, "shapes"),
    "qkv_bias": (False, "shapes"),
    "out_bias": (False, "shapes"),
    "mlp_bias": (False, "shapes"),
    "qk_norm": (False, "shapes"),
    "post_norms": (False, "shapes"),
    "hidden_act": ("relu", "logits"),
    "local_rope_theta": (200.0, "logits"),
    "zero_centered_norms": (False, "logits"),
    "scale_embeddings": (False, "logits"),
    "query_pre_attn_scalar": (7, "logits"),
    "attention_soft_cap": (0.5, "logits"),
    "logit_soft_cap": (None, "logits"),
    "sliding_window": (5, "logits"),
    "sliding_layers": ((True, True, False), "logits"),
    "initializer_range": (0.03, "init"),
    "max_position_embeddings": (64, "export"),
    "family": ("another", "export"),
}


@pytest.mark.parametrize("name", [field.name for field in fields(ModelConfig)])
def test_every_field_is_read(name: str):
    value, changes = FIELDS[name]  # a new field must be added there
    if changes == "export":
        return
    model, other = Model(RICH), Model(replace(RICH, **{name: value}))
    if changes == "shapes":
        shapes = [jax.tree.map(lambda leaf: leaf.shape, m.shapes()) for m in (model, other)]
        assert shapes[0] != shapes[1]
    elif changes == "init":
        one, two = (m.init(jax.random.key(0))["embed"]["embedding"] for m in (model, other))
        np.testing.assert_allclose(two, one * (0.03 / 0.02), rtol=1e-5)
    else:
        assert relative_error(rich_logits(other), rich_logits(model)) > 1e-3


@cache
def rich_logits(model: Model) -> np.ndarray:
    return jax_logits(model, random_params(RICH), tokens_for(CONFIG, rows=1, length=24))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "linear"),
        ("factor", 4.0),
        ("low_freq_factor", 2.0),
        ("high_freq_factor", 16.0),
        ("original_max_position_embeddings", 64),
    ],
)
def test_every_field_of_the_rope_scaling_is_read(name: str, value: object):
    assert name in {field.name for field in fields(RopeScaling)}
    assert len(fields(RopeScaling)) == 5
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 80)
    params, tokens = random_params(BASE), tokens_for(CONFIG)
    before, after = (
        jax_logits(Model(replace(BASE, rope_scaling=item)), params, tokens)
        for item in (scaling, replace(scaling, **{name: value}))
    )
    assert relative_error(after, before) > 1e-4


BOTH = pytest.mark.parametrize("config", [BASE, RICH], ids=["plain", "rich"])


def test_samples_of_one_row_do_not_see_each_other():
    model, params = Model(BASE), random_params(BASE)
    tokens, segments, positions = packed_rows()
    hidden = jax.jit(model.hidden)
    before = np.asarray(hidden(params, tokens, segments, positions))
    for segment in (0, 1, 2, 3):
        members = segments[0] == segment
        other = tokens.copy()
        other[0, members] = (other[0, members] + 1) % CONFIG["vocab_size"]
        after = np.asarray(hidden(params, other, segments, positions))
        assert np.array_equal(before[0, ~members], after[0, ~members])
        assert np.array_equal(before[1], after[1])
        assert not np.any(np.all(before[0, members] == after[0, members], axis=-1))


def test_a_token_does_not_see_later_ones():
    model, params = Model(BASE), random_params(BASE)
    tokens, segments, positions = packed_rows()
    hidden = jax.jit(model.hidden)
    before = np.asarray(hidden(params, tokens, segments, positions))
    other = tokens.copy()
    other[1, 11] = (other[1, 11] + 1) % CONFIG["vocab_size"]
    after = np.asarray(hidden(params, other, segments, positions))
    assert np.array_equal(before[1, :11], after[1, :11])
    assert not np.any(np.all(before[1, 11:] == after[1, 11:], axis=-1))


def test_layers_see_their_windows_and_no_further():
    """Layers see 6, 24 and 6 tokens in turn: of one layer a token reaches 5 places on."""
    config = replace(RICH, num_layers=1)
    tokens, _, positions = packed_rows()
    ones = np.ones((1, 24), np.int32)
    for sliding, reach in (((True, False), 6), ((False,), 24)):
        model = Model(replace(config, sliding_layers=sliding))
        params = random_params(model.config)
        hidden = jax.jit(model.hidden)
        before = np.asarray(hidden(params, tokens[1:], ones, positions[1:]))
        other = tokens[1:].copy()
        other[0, 8] = (other[0, 8] + 1) % CONFIG["vocab_size"]
        after = np.asarray(hidden(params, other, ones, positions[1:]))
        changed = np.any(before != after, axis=-1)[0]
        assert np.array_equal(np.flatnonzero(changed), np.arange(8, min(8 + reach, 24)))


@BOTH
def test_a_packed_sample_is_what_it_is_alone(config: ModelConfig):
    model, params = Model(config), random_params(config)
    tokens, segments, positions = packed_rows()
    packed = model.hidden(params, tokens, segments, positions)
    alone = model.hidden(
        params, tokens[:1, 7:16], np.ones((1, 9), np.int32), np.arange(9, dtype=np.int32)[None]
    )
    np.testing.assert_allclose(packed[0, 7:16], alone[0], atol=1e-5)


@BOTH
def test_branches_are_what_their_sequences_are_alone(config: ModelConfig):
    """A prompt of 6 with responses of 4 and 5, in one segment, against two rows of their own."""
    model, params = Model(config), random_params(config)
    tokens = tokens_for(CONFIG, rows=1, length=15).astype(np.int32)
    branches = np.array([[0] * 6 + [1] * 4 + [2] * 5], np.int32)
    positions = np.array([[*range(10), *range(6, 11)]], np.int32)
    ones = np.ones((1, 15), np.int32)
    shared = model.hidden(params, tokens, ones, positions, branches=branches)

    def alone(*spans: slice) -> jax.Array:
        row = np.concatenate([tokens[:, span] for span in spans], axis=1)
        places = np.arange(row.shape[1], dtype=np.int32)[None]
        return model.hidden(params, row, np.ones_like(row), places)[0]

    prompt, first, second = slice(0, 6), slice(6, 10), slice(10, 15)
    np.testing.assert_allclose(shared[0, :10], alone(prompt, first), atol=1e-5)
    np.testing.assert_allclose(shared[0, second], alone(prompt, second)[6:], atol=1e-5)


def test_bfloat16_computes_in_bfloat16_from_float32_parameters():
    model, params = Model(BASE), random_params(BASE)
    rows = packed_rows()
    narrow = model.hidden(params, *rows, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    exact = np.asarray(model.hidden(params, *rows))
    error = relative_error(np.asarray(narrow, np.float32), exact)
    assert 1e-4 < error < 0.05


@BOTH
def test_float64_runs_from_float32_parameters(config: ModelConfig):
    model, params, rows = Model(config), random_params(config), packed_rows()
    single = np.asarray(model.hidden(params, *rows))
    with jax.enable_x64(True):
        double = model.hidden(params, *rows, dtype=jnp.float64)
        assert double.dtype == jnp.float64
        assert relative_error(single, np.asarray(double)) < 1e-5


def test_recomputation_changes_neither_values_nor_gradients():
    model, params, rows = Model(RICH), random_params(RICH), packed_rows()

    @partial(jax.jit, static_argnums=1)
    def total(params, remat: str):
        return jax.value_and_grad(
            lambda params: jnp.sum(jnp.sin(model.hidden(params, *rows, remat=remat)))
        )(params)

    value, gradient = total(params, "none")
    for remat in ("full", "dots"):
        other_value, other_gradient = total(params, remat)
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True)
        for one, two in pairs:
            np.testing.assert_allclose(two, one, atol=1e-5)


def test_a_stack_of_parameters_can_be_mapped_over():
    model, rows = Model(RICH), packed_rows()
    stacked = [random_params(RICH, seed) for seed in range(3)]
    tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    together = jax.vmap(lambda params: model.hidden(params, *rows))(tree)
    for index, params in enumerate(stacked):
        np.testing.assert_allclose(together[index], model.hidden(params, *rows), atol=1e-5)


def test_head_is_the_embedding_transposed_where_tied():
    tied = replace(BASE, tie_word_embeddings=True)
    params = random_params(tied)
    assert "head" not in params
    assert jnp.array_equal(Model(tied).head(params), params["embed"]["embedding"].T)
    assert Model(BASE).head(random_params(BASE)).shape == (24, 61)


def test_layers_are_scanned_so_that_programs_do_not_grow_with_depth():
    def size(layers: int) -> int:
        model = Model(replace(BASE, num_layers=layers))
        shapes = [jax.ShapeDtypeStruct((1, 8), jnp.int32)] * 3
        return len(jax.jit(model.hidden).lower(model.shapes(), *shapes).as_text())

    assert size(12) < 1.05 * size(3)
