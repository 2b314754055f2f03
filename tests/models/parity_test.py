"""Every family against transformers: logits, gradients, greedy text, and the way out again."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from montessori_jax.config import SamplingConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import pack
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.models import Model
from montessori_jax.models.families import family_of
from montessori_jax.models.folder import load_folder, save_folder
from montessori_jax.models.weights import from_params, to_params
from montessori_jax.training.losses import token_losses
from tests.models.tiny import (
    FAMILIES,
    jax_logits,
    relative_error,
    state,
    tokenizer,
    tokens_for,
    torch_logits,
    torch_model,
)

LENGTH = 40  # more than four windows


@cache
def both(name: str):
    """transformers' model, and ours with its weights."""
    theirs = torch_model(FAMILIES[name])
    config = family_of(FAMILIES[name], "test")
    return theirs, Model(config), to_params(config, state(theirs))


def changed(name: str, **changes: object) -> dict:
    return FAMILIES[name] | changes


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str):
    theirs, model, params = both(name)
    tokens = tokens_for(FAMILIES[name], length=LENGTH)
    assert relative_error(jax_logits(model, params, tokens), torch_logits(theirs, tokens)) < 1e-5


# What the tiny configurations above leave at one value.
VARIATIONS = [
    ("mistral", {"sliding_window": None, "head_dim": None, "tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False}),
    (
        "qwen2",
        {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
    ),
    (
        "qwen3",
        {
            "attention_bias": True,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
        },
    ),
    (
        "gemma2",
        {
            "hidden_activation": "gelu",
            "query_pre_attn_scalar": 8,
            "rms_norm_eps": 0.5,
            "tie_word_embeddings": False,
            "rope_theta": 500.0,
        },
    ),
    (
        "gemma3_text",
        {
            "final_logit_softcapping": None,
            "rope_scaling": None,
            "layer_types": ["sliding_attention"] * 3,
            "rope_local_base_freq": 7.0,
        },
    ),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
]


@pytest.mark.parametrize(("name", "changes"), VARIATIONS, ids=str)
def test_settings_of_families_both_ways(name: str, changes: dict, tmp_path: Path):
    config_json = changed(name, **changes)
    theirs, config = torch_model(config_json), family_of(config_json, "test")
    tokens = tokens_for(config_json, rows=1, length=LENGTH)
    expected = torch_logits(theirs, tokens)
    base = torch_logits(both(name)[0], tokens)
    assert relative_error(expected, base) > 1e-3  # the setting matters
    params = to_params(config, state(theirs))
    assert relative_error(jax_logits(Model(config), params, tokens), expected) < 1e-5
    save_folder(tmp_path / "out", Model(config), params, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert np.array_equal(torch_logits(loaded, tokens), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_training_loss_for_all_parameters(name: str):
    """Two samples packed in a row here, one after the other there."""
    theirs, model, params = both(name)
    texts = [tokens_for(FAMILIES[name], rows=1, length=size)[0] for size in (LENGTH, 23)]
    theirs.zero_grad()
    total = 0.0
    for text in texts:
        out = theirs(torch.tensor(text[None]), use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(out, torch.tensor(text[1:]), reduction="sum")
        loss.backward()
        total += loss.item()

    chats = [EncodedChat(text.astype(np.int32), 1) for text in texts]
    batch = pack(chats, [[0, 1]], row_length=64, slots=64)

    def loss(params):
        return jnp.sum(token_losses(model, params, batch) * batch.target_weights)

    found_loss, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert float(found_loss) == pytest.approx(total, rel=1e-6)
    expected = {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    found = dict(from_params(model.config, gradient))
    assert found.keys() == expected.keys()
    largest = max(float(np.abs(array).max()) for array in expected.values())
    for key, array in expected.items():
        assert np.abs(found[key] - array).max() < 1e-4 * np.abs(array).max() + 1e-7 * largest, key


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_logits_are_the_same_bits_in_transformers_after_an_export(
    name: str, tmp_path: Path
):
    theirs, model, params = both(name)
    save_folder(tmp_path / "out", model, params, tokenizer(), {"eos_token_id": 2})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is type(theirs)
    after = state(loaded)
    assert after.keys() == state(theirs).keys()
    for key, array in state(theirs).items():
        assert after[key].tobytes() == array.tobytes(), key
    tokens = tokens_for(FAMILIES[name], length=LENGTH)
    assert np.array_equal(torch_logits(loaded, tokens), torch_logits(theirs, tokens))
    again = load_folder(tmp_path / "out")
    # The pattern of layers may come back written out; it says the same.
    assert again.model.config.sliding == model.config.sliding
    assert again.model.config == model.config
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again.params, params)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])
def test_greedy_text_is_that_of_generate(name: str):
    """A prompt longer than the window and one shorter, token for token, by our sampler.

    Llama's is in generation/sampler/parity_test. Tied heads would repeat themselves, being random.
    """
    config_json = FAMILIES[name] | {"tie_word_embeddings": False, "num_hidden_layers": 2}
    theirs, config = torch_model(config_json, seed=1), family_of(config_json, "test")
    prompts = [tokens_for(config_json, rows=1, length=size)[0].tolist() for size in (14, 6)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": 60, "pad_token_id": 0}
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected.append(tuple(made[0, len(prompt) :].tolist()))
    chat = SimpleNamespace(stop_ids=(60,), decode=lambda ids: " ".join(map(str, ids)))
    sampler = JaxSampler(Model(config), to_params(config, state(theirs)), chat)
    settings = SamplingConfig(temperature=0.0, max_tokens=16, prompts_per_batch=2)
    requests = [PromptRequest(str(i), tuple(prompt), i) for i, prompt in enumerate(prompts)]
    batches = sampler.generate(requests, settings, samples=1, seed=0)
    found = {one.prompt_id: one.tokens for batch in batches for one in batch}
    assert [found["0"], found["1"]] == expected
    assert all(len(set(text)) > 6 for text in expected)
