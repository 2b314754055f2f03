import dataclasses

import jax
import numpy as np
import pytest
import torch

from montessori_jax.config import SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.rows import read_rows
from montessori_jax.errors import UserError
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.sampler import JaxSampler, plan
from montessori_jax.models import Model, ModelConfig
from tests.tiny_world import tiny_tokenizer

CONFIG = ModelConfig(
    family="llama",
    vocab_size=2000,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def tiny():
    rows = read_rows("package:seeds").rows
    tokenizer = tiny_tokenizer([f"{row.instruction} {row.response}" for row in rows])
    model = Model(dataclasses.replace(CONFIG, vocab_size=len(tokenizer)))
    return JaxSampler(model, model.init(jax.random.key(3)), ChatFormat(tokenizer))


@pytest.fixture(scope="module")
def requests(tiny):
    rows = read_rows("package:seeds").rows[:7]
    return [
        PromptRequest(f"p{i}", tuple(tiny.chat.encode_prompt(row.prompt())), i)
        for i, row in enumerate(rows)
    ]


SETTINGS = SamplingConfig(
    max_tokens=20, prompts_per_batch=3, top_p=0.95, presence_penalty=0.5, repetition_penalty=1.1
)


def generate(sampler, requests, settings=SETTINGS, samples=2, stop=(), seed=5, finished=()):
    batches = sampler.generate(
        requests, settings, samples=samples, stop=stop, seed=seed, finished=finished
    )
    return {(one.prompt_id, one.index): one for batch in batches for one in batch}


def test_every_prompt_gets_its_samples_and_they_differ(tiny, requests):
    made = generate(tiny, requests)
    assert set(made) == {(f"p{i}", j) for i in range(7) for j in range(2)}
    assert len({one.tokens for one in made.values()}) == len(made)
    assert all(1 <= len(one.tokens) <= 20 for one in made.values())


def test_the_same_again_and_another_seed_is_another_text(tiny, requests):
    first = generate(tiny, requests)
    assert generate(tiny, requests) == first
    other = generate(tiny, requests, seed=6)
    assert all(other[key].tokens != first[key].tokens for key in first)


def test_a_row_depends_neither_on_its_neighbours_nor_on_an_interruption(tiny, requests):
    whole = generate(tiny, requests)
    resumed = generate(tiny, requests, finished={"p0", "p2", "p5"})
    assert set(resumed) == {key for key in whole if key[0] not in ("p0", "p2", "p5")}
    assert all(resumed[key] == whole[key] for key in resumed)
    alone = generate(tiny, [requests[4]])
    assert all(alone[key] == whole[key] for key in alone)
    reverse = generate(tiny, requests[::-1])
    assert reverse == whole


def test_text_ends_before_the_stop_string_wherever_tokens_fall(tiny, requests):
    free = generate(tiny, requests)
    key, text = next((k, one.text) for k, one in free.items() if len(one.text) > 12)
    stop = text[5:9]
    stopped = generate(tiny, requests, stop=(stop,))[key]
    assert stopped.finish == "stop"
    assert stopped.stop == stop
    assert stopped.text == text[: text.index(stop)]
    assert stop in tiny.chat.decode(stopped.tokens)
    assert stop not in tiny.chat.decode(stopped.tokens[:-1])
    assert stopped.tokens == free[key].tokens[: len(stopped.tokens)]


def test_the_end_of_the_turn_ends_the_text(tiny, requests):
    free = generate(tiny, requests)
    key, one = next((k, c) for k, c in free.items() if len(c.tokens) > 6)
    chat = tiny.chat

    class Ends(type(chat)):
        stop_ids = (one.tokens[5],)

    ending = Ends(chat.tokenizer)
    ended = generate(dataclasses.replace(tiny, chat=ending), requests)[key]
    first = one.tokens.index(one.tokens[5])
    assert ended.finish == "end"
    assert ended.tokens == one.tokens[: first + 1]
    assert ended.text == chat.decode(one.tokens[:first])


def test_a_prompt_without_room_is_named(tiny, requests):
    long = PromptRequest("long", tuple(range(3, 250)), 9)
    with pytest.raises(UserError, match="prompt long has 247 tokens"):
        generate(tiny, [*requests, long])


def test_batches_are_planned_over_all_requests_and_in_few_lengths():
    sizes = [10, 20, 100, 14, 90, 30]
    requests = [PromptRequest(str(i), (1,) * size, i) for i, size in enumerate(sizes)]
    planned = plan(requests, 2)
    assert [(length, [one.id for one in batch]) for length, batch in planned] == [
        (16, ["0", "3"]),
        (32, ["1", "5"]),
        (128, ["2", "4"]),
    ]


def test_penalties_see_the_prompt_and_what_was_written(tiny, requests):
    # Each token can be written once: its second time costs more than any logit is worth.
    never = SamplingConfig(max_tokens=20, prompts_per_batch=7, frequency_penalty=2.0, top_k=2)
    strong = dataclasses.replace(never, repetition_penalty=50.0)
    plain = dataclasses.replace(never, frequency_penalty=0.0)
    repeats = {
        name: sum(
            len(one.tokens) - len(set(one.tokens))
            for one in generate(tiny, requests, settings).values()
        )
        for name, settings in (("plain", plain), ("strong", strong))
    }
    assert repeats["strong"] < repeats["plain"] / 4


def top_two_gap(logits: torch.Tensor) -> float:
    best = torch.topk(logits, 2).values
    return float(best[0] - best[1])


def check_greedy(smollm2, smollm2_torch, count, length):
    chat = ChatFormat.of(smollm2)
    rows = read_rows("package:seeds").rows[:count]
    prompts = [chat.encode_prompt(row.prompt()) for row in rows]
    requests = [PromptRequest(str(i), tuple(ids), i) for i, ids in enumerate(prompts)]
    settings = SamplingConfig(temperature=0.0, max_tokens=length, prompts_per_batch=count)
    sampler = JaxSampler(smollm2.model, smollm2.params, chat)
    made = generate(sampler, requests, settings, samples=1)
    compared = 0
    for i, ids in enumerate(prompts):
        ours = list(made[str(i), 0].tokens)
        theirs = smollm2_torch.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(chat.stop_ids),
        )[0, len(ids) :].tolist()
        if ours != theirs:
            at = next(
                (j for j, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            with torch.no_grad():
                logits = smollm2_torch(torch.tensor([[*ids, *theirs[:at]]])).logits[0, -1]
            assert top_two_gap(logits) < 1e-3, (i, at)
        compared += len(ours)
    assert compared > count * length / 4


def test_greedy_text_is_transformers_on_smollm2(smollm2, smollm2_torch):
    check_greedy(smollm2, smollm2_torch, 4, 24)


@pytest.mark.slow
def test_greedy_text_is_transformers_on_smollm2_20_prompts(smollm2, smollm2_torch):
    check_greedy(smollm2, smollm2_torch, 20, 64)


def test_a_row_of_smollm2_depends_on_nothing_beside_it(smollm2):
    chat = ChatFormat.of(smollm2)
    rows = read_rows("package:seeds").rows[:3]
    requests = [
        PromptRequest(str(i), tuple(chat.encode_prompt(row.prompt())), i)
        for i, row in enumerate(rows)
    ]
    settings = SamplingConfig(max_tokens=12, prompts_per_batch=3, top_p=0.9)
    sampler = JaxSampler(smollm2.model, smollm2.params, chat)
    together = generate(sampler, requests, settings)
    for request in requests[1:]:
        alone = generate(sampler, [request], settings)
        assert all(alone[key] == together[key] for key in alone)
    assert all(np.isfinite(one.tokens).all() for one in together.values())
