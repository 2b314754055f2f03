"""The sampler against transformers and against a plain loop; the real model's texts."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from montessori_jax.config import SamplingConfig
from montessori_jax.generation.generator import Completion, PromptRequest
from montessori_jax.generation.sampling import draw
from montessori_jax.models.folder import load_folder
from montessori_jax.models.loaded import LoadedModel
from tests.generation.sampler.asked import TEXT, real_requests, requests, run, sampler
from tests.generation.sampling_test import by_vllm_definition
from tests.models.tiny import CONFIG, torch_model, write_folder


def by_transformers(
    model: torch.nn.Module, prompt: Sequence[int], count: int, stop_ids: Sequence[int]
) -> list[int]:
    """Greedy tokens after the prompt, the end of turn included."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(stop_ids),
            pad_token_id=0,
        )
    return found[0, len(prompt) :].tolist()


def assert_greedy_equal(
    model: torch.nn.Module,
    asked: Sequence[PromptRequest],
    made: dict[tuple[str, int], Completion],
    count: int,
    stop_ids: Sequence[int],
) -> None:
    """Token for token, up to a place where transformers' first two are within 1e-3."""
    for request in asked:
        expected = by_transformers(model, request.tokens, count, stop_ids)
        found = list(made[request.id, 0].tokens)
        if found == expected:
            continue
        place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
        with torch.no_grad():
            logits = model(torch.tensor([[*request.tokens, *expected[:place]]])).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second < 1e-3, (request.id, place)


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_text_is_transformers(tmp_path: Path, tied: bool):
    config = CONFIG | {
        "max_position_embeddings": 400, "tie_word_embeddings": tied, "attention_bias": True,
    }  # fmt: skip
    loaded = load_folder(write_folder(tmp_path, config), name="tiny")
    settings = SamplingConfig(temperature=0.0, max_tokens=150, prompts_per_batch=4)
    generator = sampler(loaded)
    made = run(generator, requests(), settings, samples=1)
    stop_ids = generator.chat.stop_ids
    assert_greedy_equal(torch_model(config), requests(), made, 150, stop_ids)
    # So long a text needs a second block of the cache.
    assert any(len(one.tokens) == 150 for one in made.values())


draw_once = jax.jit(draw, static_argnums=2)


def plainly(
    loaded: LoadedModel, request: PromptRequest, sample: int, seed: int, settings: SamplingConfig
) -> list[int]:
    """One completion by whole forward passes, penalties in numpy and a key made by hand."""
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, request.row), sample)
    hidden = jax.jit(loaded.model.hidden)
    written: list[int] = []
    for step in range(settings.max_tokens):
        row = np.zeros((1, 64), np.int32)
        size = len(request.tokens) + step
        row[0, :size] = [*request.tokens, *written]
        places = np.arange(64, dtype=np.int32)[None]
        states = hidden(loaded.params, row, (places < size).astype(np.int32), places)
        logits = np.asarray(states[0, size - 1] @ loaded.model.head(loaded.params))
        logits = by_vllm_definition(logits, list(request.tokens), written, settings)
        scores = jnp.asarray(logits[None], jnp.float32)
        new = draw_once(scores, jax.random.fold_in(key, step)[None], settings)
        written.append(int(new[0]))
        if written[-1] == 2:
            break
    return written


@pytest.mark.parametrize(
    "settings",
    [
        TEXT,
        SamplingConfig(max_tokens=20, prompts_per_batch=3, temperature=1.3),
        SamplingConfig(
            max_tokens=12, prompts_per_batch=5, top_k=20, top_p=0.95, repetition_penalty=1.4,
            frequency_penalty=0.3,
        ),
    ],
)  # fmt: skip
def test_sampled_text_is_that_of_a_plain_loop(tiny: LoadedModel, settings: SamplingConfig):
    made = run(sampler(tiny), requests(), settings, samples=3, seed=11)
    for request in requests():
        for sample in range(3):
            expected = plainly(tiny, request, sample, 11, settings)
            assert list(made[request.id, sample].tokens) == expected


@pytest.mark.parametrize(
    ("prompts", "count"), [(4, 24), pytest.param(20, 64, marks=pytest.mark.slow)]
)
def test_greedy_text_of_smollm2_is_transformers(
    smollm2: LoadedModel, smollm2_torch: torch.nn.Module, prompts: int, count: int
):
    settings = SamplingConfig(temperature=0.0, max_tokens=count, prompts_per_batch=prompts)
    generator, asked = sampler(smollm2), real_requests(smollm2, prompts)
    made = run(generator, asked, settings, samples=1)
    assert_greedy_equal(smollm2_torch, asked, made, count, generator.chat.stop_ids)
    assert len({one.text for one in made.values()}) == prompts


def test_texts_of_smollm2_depend_on_nothing_beside_them(smollm2: LoadedModel):
    generator, asked = sampler(smollm2), real_requests(smollm2, 6)
    settings = SamplingConfig(max_tokens=20, top_p=0.9, presence_penalty=1.0, prompts_per_batch=3)
    made = run(generator, asked, settings)
    assert run(generator, asked, settings) == made
    assert run(generator, asked[::-1], settings) == made
    some = [asked[4], asked[1]]
    assert run(generator, some, settings) == {
        key: one for key, one in made.items() if key[0] in {request.id for request in some}
    }
    assert run(generator, asked, settings, finished={asked[0].id}) == {
        key: one for key, one in made.items() if key[0] != asked[0].id
    }
