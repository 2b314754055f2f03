"""The texts that a tuned teacher's server is checked with: greedy, by the teacher before."""

from collections.abc import Sequence

import numpy as np

from montessori_jax.config import SamplingConfig
from montessori_jax.data.chat import ChatFormat, EncodedChat
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.serving.probe import ProbeText
from montessori_jax.training.pairs import EncodedPair

PROMPTS, TOKENS = 4, 16


def greedy_texts(teacher: LoadedModel, pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Greedy continuations of the shortest prompts among ``pairs``, each as a pair with itself.

    As pairs, because that is what `pair_log_probs` measures.
    """
    prompts = {tuple(pair.chosen.tokens[: pair.chosen.prompt_length].tolist()) for pair in pairs}
    chosen = sorted(prompts, key=lambda prompt: (len(prompt), prompt))[:PROMPTS]
    sampler = JaxSampler(teacher.model, teacher.params, ChatFormat.of(teacher))
    requests = [PromptRequest(str(index), prompt, index) for index, prompt in enumerate(chosen)]
    settings = SamplingConfig(
        temperature=0.0, max_tokens=TOKENS, prompts_per_batch=PROMPTS, dtype="float32"
    )
    texts = []
    for made in sampler.generate(requests, settings, samples=1, seed=0):
        (one,) = made
        prompt = chosen[int(one.prompt_id)]
        whole = EncodedChat(np.asarray([*prompt, *one.tokens], np.int32), len(prompt))
        texts.append(EncodedPair(one.prompt_id, whole, whole))
    return texts


def probe_texts(
    texts: Sequence[EncodedPair], before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> list[ProbeText]:
    """`greedy_texts` with their log-probs; those cut at the longest length are left out."""
    found = []
    for text, old, new in zip(texts, before, after, strict=True):
        length = text.chosen.response_length
        if len(new) == 2 * length:
            found.append(
                ProbeText(
                    tokens=text.chosen.tokens.tolist(),
                    start=text.chosen.prompt_length,
                    before=old[:length].tolist(),
                    after=new[:length].tolist(),
                )
            )
    return found
