"""Adapters against peft: logits, gradients, merging; what is initialised, shared and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from montessori_jax.errors import UserError
from montessori_jax.models.lora import LoraModel, LoraSpec, init_adapter
from tests.models import tiny
from tests.models.peft_twin import CONFIG, logits, to_tree, twins

TOKENS = tiny.tokens_for(CONFIG, rows=2, length=12).astype(np.int32)


def numpy(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (("all-linear",), {}),
        (("q_proj", "mlp.down_proj"), {"rank": 4, "alpha": 10.0, "rslora": True}),
    ],
)
def test_logits_and_gradients_are_pefts(targets, options):
    ours, adapter, theirs = twins(targets, **options)
    expected = tiny.torch_logits(theirs, TOKENS)
    assert tiny.relative_error(logits(ours, adapter, TOKENS), expected) < 1e-5
    off = jax.tree.map(jnp.zeros_like, adapter)
    assert tiny.relative_error(logits(ours, off, TOKENS), expected) > 1e-2

    weights = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32)
    ids = torch.tensor(TOKENS)
    output = theirs(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    (output * torch.tensor(weights)).sum().backward()
    wanted = to_tree(
        {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    )

    @jax.jit
    def gradient(model, adapter):
        return jax.grad(lambda tree: jnp.sum(logits(model, tree, TOKENS) * weights))(adapter)

    found = numpy(gradient(ours, adapter))
    assert found.keys() == numpy(wanted).keys()
    for name, value in numpy(wanted).items():
        assert tiny.relative_error(found[name], value) < 1e-4, name


def test_merged_parameters_are_pefts():
    ours, adapter, theirs = twins(rank=4)
    merged = ours.merged(adapter)
    kernel = np.asarray(merged["layers"]["mlp"]["down"]["kernel"])
    found = logits(ours.decoder, merged, TOKENS)
    model = theirs.merge_and_unload()
    expected = [layer.mlp.down_proj.weight.detach().numpy().T for layer in model.model.layers]
    np.testing.assert_allclose(kernel, np.stack(expected), rtol=1e-6, atol=1e-6)
    assert tiny.relative_error(found, tiny.torch_logits(model, TOKENS)) < 1e-5
    assert merged["embed"]["embedding"] is ours.base["embed"]["embedding"]


def test_a_fresh_adapter_changes_nothing_and_is_keyed_by_name():
    ours, _, theirs = twins()
    adapter = ours.init(jax.random.key(1))
    off = logits(ours.decoder, ours.base, TOKENS)
    np.testing.assert_array_equal(logits(ours, adapter, TOKENS), off)
    # peft's own: uniform up to 1 / sqrt(inputs), the same for each layer and module.
    query = np.asarray(adapter["layers"]["attention"]["query"]["lora_a"])
    bound = CONFIG["hidden_size"] ** -0.5
    assert 0.9 * bound < np.abs(query).max() <= bound
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    layer.reset_lora_parameters("default", True)
    assert 0.9 * bound < layer.lora_A["default"].weight.abs().max() <= bound
    assert not np.array_equal(query[0], query[1])
    # Another choice of targets draws the same numbers for the ones they share.
    alone = init_adapter(jax.random.key(1), ours.decoder, LoraSpec(3, targets=("q_proj",)))
    np.testing.assert_array_equal(alone["layers"]["attention"]["query"]["lora_a"], query)
    assert list(alone["layers"]) == ["attention"]


def test_scale_by_hand():
    assert LoraSpec(8, 16.0).scale == 2.0
    assert LoraSpec(16, 16.0, rslora=True).scale == 4.0


def test_many_adapters_share_one_base():
    ours, adapter, _ = twins()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), adapter)

    def each(model, adapters):
        return jax.vmap(lambda one: logits(model, one, TOKENS))(adapters)

    found = jax.jit(each)(ours, stacked)
    np.testing.assert_allclose(found[0], logits(ours, adapter, TOKENS), rtol=1e-5, atol=1e-5)
    # The base is an argument of the program, no constant in it, and nothing has its size three
    # times over: a merged kernel or a copied one would.
    closed = jax.make_jaxpr(each)(ours, stacked)
    assert sum(np.size(constant) for constant in closed.consts) < 100
    kernel = ours.base["layers"]["mlp"]["gate"]["kernel"].shape
    assert f"f32[3,{','.join(map(str, kernel[1:]))}]" not in str(closed)
    with pytest.raises(TypeError, match="unhashable"):
        hash(ours)


def test_bfloat16_compute_and_a_bfloat16_base():
    ours, adapter, _ = twins()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours.base)
    held = LoraModel(ours.config, half, ours.spec)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

    @jax.jit
    def hidden(model, adapter):
        ones = jnp.ones_like(positions)
        return model.hidden(adapter, jnp.asarray(TOKENS), ones, positions, dtype=jnp.bfloat16)

    found = [hidden(model, adapter) for model in (ours, held)]
    assert found[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(*(np.asarray(one, np.float32) for one in found))
    kernel = held.merged(adapter)["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16


def test_merging_frees_the_base_where_asked():
    ours, adapter, _ = twins(("v_proj",))
    kept = ours.base["layers"]["attention"]["query"]["kernel"]
    gone = ours.base["layers"]["attention"]["value"]["kernel"]
    merged = ours.merged(adapter, consume=True)
    assert gone.is_deleted()
    assert not kept.is_deleted()
    assert merged["layers"]["attention"]["query"]["kernel"] is kept


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoraSpec(4, targets=("q_proj", "c_attn")), "LoRA target 'c_attn' is no linear layer"),
        (
            LoraSpec(4, targets=("lm_head",)),
            "LoRA target 'lm_head' .* there are: all-linear, q_proj",
        ),
        (LoraSpec(4, targets=("proj",)), "LoRA target 'proj'"),
        (LoraSpec(4, targets=()), "LoRA has no targets"),
        (LoraSpec(0), "LoRA rank 0"),
    ],
)
def test_what_matches_nothing_is_refused(spec, message):
    ours, _, _ = twins()
    with pytest.raises(UserError, match=message) as caught:
        init_adapter(jax.random.key(0), ours.decoder, spec)
    assert "\n" not in str(caught.value)
