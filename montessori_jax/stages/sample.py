"""How stages have a teacher write: every text is journalled as it comes."""

import contextlib
from collections.abc import Sequence
from typing import Any

from montessori_jax import cluster
from montessori_jax.config import Price, SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.prompts import Prompt
from montessori_jax.generation.teacher import Teacher
from montessori_jax.runs import SharedJournal
from montessori_jax.work import Work


def encode_prompt(chat: ChatFormat, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a request, the prefill included."""
    if prompt.messages is None:
        assert prompt.text is not None
        return tuple(chat.encode_text(prompt.text + prompt.prefill))
    return tuple(chat.encode_prompt(prompt.messages, prefill=prompt.prefill))


def as_request(
    teacher: Teacher, name: str, prompt: Prompt, row: int, *, structured: bool = False
) -> PromptRequest:
    """A prompt as the teacher's generator takes it: ids, or messages where it makes its own."""
    pattern = prompt.pattern if structured else ""
    if teacher.chat is not None:
        return PromptRequest(name, encode_prompt(teacher.chat, prompt), row, pattern=pattern)
    # A prefill cannot be said in messages; without any, the back-end refuses the request.
    messages = () if prompt.prefill else tuple(prompt.messages or ())
    return PromptRequest(name, (), row, messages, pattern)


def sample(
    teacher: Teacher,
    requests: Sequence[PromptRequest],
    settings: SamplingConfig,
    journal: SharedJournal,
    work: Work,
    *,
    samples: int,
    stop: tuple[str, ...],
    seed: int,
    label: str,
    total: int,
) -> dict[str, list[dict[str, Any]]]:
    """Completions by prompt id, journalled prompt by prompt; finished ones are not asked again.

    The processes of a job take every so-manieth prompt each, or each text together.
    """
    finished = [one for record in journal.records for one in record["completions"]]
    done = {one["prompt_id"] for one in finished}
    # What is done all of them know since the journal was opened.
    left = [request for request in requests if request.id not in done]
    others = {
        request.id
        for number, request in enumerate(left)
        if not teacher.together and number % cluster.count() != cluster.index()
    }
    batches = teacher.generator.generate(
        requests, settings, samples=samples, stop=stop, seed=seed, finished=done | others
    )
    price = teacher.price or Price()
    bar = work.bar(total, "text", label, done=len(finished))
    advice = (
        f"lower prompts_per_batch (now {settings.prompts_per_batch}), samples (now {samples}) or "
        f"max_tokens (now {settings.max_tokens})"
    )
    with bar, contextlib.closing(batches), fits_in_memory(label, advice, "mesh.sampler"):
        for batch in batches:
            # A batch is one line: a kill leaves all of it or nothing.
            made = [
                {
                    "prompt_id": one.prompt_id,
                    "index": one.index,
                    # A stop string belongs to the answer that it ended.
                    "text": one.text + one.stop,
                    "finish": one.finish,
                    "tokens": one.generated_tokens,
                }
                for one in batch
            ]
            journal.append({"completions": made})
            prompted = sum(one.prompt_tokens for one in batch)
            generated = sum(one.generated_tokens for one in batch)
            work.meter.count(
                flops=2.0 * teacher.parameters * (prompted + generated),
                dollars=(price.prompt * prompted + price.generated * generated) / 1e6,
                prompt_tokens=prompted,
                generated_tokens=generated,
            )
            bar.update(len(batch))
            if cluster.count() == 1:
                work.stop.check()
            elif teacher.together:
                if cluster.any_of(work.stop.requested()):
                    break
            elif cluster.told_to_stop(work.stop.requested()):
                break  # what there is is gathered first
    journal.gather()
    work.check_stop()
    finished = [one for record in journal.records for one in record["completions"]]
    count_others(teacher, requests, finished, others, work)
    asked = {request.id for request in requests}
    # A prompt may have been asked twice, by processes that did not know of each other.
    once = {(one["prompt_id"], one["index"]): one for one in reversed(finished)}
    texts: dict[str, list[dict[str, Any]]] = {request.id: [] for request in requests}
    for prompt_id, index in sorted(once):
        if prompt_id in asked:
            texts[prompt_id].append(once[prompt_id, index])
    return texts


def count_others(
    teacher: Teacher,
    requests: Sequence[PromptRequest],
    finished: Sequence[dict[str, Any]],
    others: set[str],
    work: Work,
) -> None:
    """What the other processes asked and got, in the leader's ledger, which is the run's."""
    told = [one for one in finished if one["prompt_id"] in others]
    answered = {one["prompt_id"] for one in told}
    prompted = sum(len(request.tokens) for request in requests if request.id in answered)
    generated = sum(one["tokens"] for one in told)
    work.meter.count(
        flops=2.0 * teacher.parameters * (prompted + generated),
        prompt_tokens=prompted,
        generated_tokens=generated,
    )
