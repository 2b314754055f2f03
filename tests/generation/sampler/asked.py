"""What the sampler's tests ask for, and the sampler's answers by prompt and sample."""

from collections.abc import Sequence

import numpy as np

from montessori_jax.config import SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.rows import read_rows
from montessori_jax.generation.generator import Completion, PromptRequest
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.models.loaded import LoadedModel

LENGTHS = [5, 16, 9, 24, 21, 12, 30]
TEXT = SamplingConfig(max_tokens=12, prompts_per_batch=3, top_p=0.9, presence_penalty=0.5)


def sampler(loaded: LoadedModel) -> JaxSampler:
    return JaxSampler(loaded.model, loaded.params, ChatFormat.of(loaded))


def requests(lengths: Sequence[int] = LENGTHS, vocab: int = 61) -> list[PromptRequest]:
    rng = np.random.default_rng(3)
    return [
        PromptRequest(f"p{i}", tuple(rng.integers(3, vocab, size).tolist()), 100 + i)
        for i, size in enumerate(lengths)
    ]


def run(
    generator: JaxSampler,
    asked: Sequence[PromptRequest],
    settings: SamplingConfig,
    samples: int = 2,
    **options,
) -> dict[tuple[str, int], Completion]:
    options = {"seed": 0, "stop": ()} | options
    made = [
        one
        for batch in generator.generate(asked, settings, samples=samples, **options)
        for one in batch
    ]
    found = {(one.prompt_id, one.index): one for one in made}
    assert len(found) == len(made)
    return found


def real_requests(loaded: LoadedModel, count: int) -> list[PromptRequest]:
    chat = ChatFormat.of(loaded)
    rows = read_rows("package:seeds", need_response=False).rows[:count]
    return [
        PromptRequest(row.id, tuple(chat.encode_prompt(row.prompt())), index)
        for index, row in enumerate(rows)
    ]
