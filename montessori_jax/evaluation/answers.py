"""A student's answers to prompts: drawn by the built-in sampler and journalled, or from a file."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from montessori_jax.config import SamplingConfig, as_dict
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.rows import Message, read_rows
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.dtypes import compute_dtype
from montessori_jax.errors import UserError
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.prompts import task_text
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.runs import Journal, value_hash, write_atomic
from montessori_jax.seeding import derive_seed
from montessori_jax.work import Work

Conversation = Sequence[Message]
"""Chat messages that end with a user turn."""


def asked_of(instructions: Iterable[str]) -> list[Conversation]:
    """Conversations of one turn."""
    return [[{"role": "user", "content": text}] for text in instructions]


def kept_answers(
    fingerprint: str,
    asked: Sequence[Conversation],
    settings: SamplingConfig,
    path: Path,
    work: Work,
    *,
    elsewhere: Iterable[Path] = (),
) -> list[str] | None:
    """The answers in ``path`` if they are all there, else None: whoever answers must be loaded.

    Where ``path`` does not exist it is copied from the first of ``elsewhere`` that has them all.
    """
    key = _key(fingerprint, asked, settings, work)
    if not path.exists():
        for other in elsewhere:
            text = other.read_text(encoding="utf-8")
            # Looked at only: whoever writes it may be at it.
            if text.startswith(f'{{"journal": "{value_hash(key)}"') and text.endswith("\n"):
                write_atomic(path, text)
                break
    return _all(Journal(path, key), len(asked)) if path.exists() else None


def draw_answers(
    student: LoadedModel,
    asked: Sequence[Conversation],
    settings: SamplingConfig,
    path: Path,
    work: Work,
    *,
    label: str,
    temperatures: Sequence[float] | None = None,
) -> list[str]:
    """One answer to each conversation, in their order; those in the journal are not drawn again.

    Args:
        student: who answers.
        asked: what it is asked.
        settings: how tokens are drawn.
        path: the journal, a line an answer.
        work: its seed and a conversation's place key the draws; counts tokens and operations.
        label: what the bar says.
        temperatures: one a conversation, instead of that of the settings.

    Raises:
        UserError: a prompt is too long for the student together with ``max_tokens``.
    """
    temperatures = temperatures or [settings.temperature] * len(asked)
    journal = Journal(path, _key(student.fingerprint, asked, settings, work, temperatures))
    chat = ChatFormat.of(student)
    requests = [
        PromptRequest(str(number), tuple(chat.encode_prompt(list(messages))), number)
        for number, messages in enumerate(asked)
    ]
    sampler = JaxSampler(student.model, student.params, chat)
    done = {one["id"] for one in journal.records}
    parameters = student.model.parameter_count()
    advice = f"lower answers.prompts_per_batch (now {settings.prompts_per_batch})"
    with work.bar(len(asked), "answer", label, len(done)) as bar, fits_in_memory(label, advice):
        for temperature in sorted(set(temperatures)):
            drawn = sampler.generate(
                [requests[i] for i, own in enumerate(temperatures) if own == temperature],
                replace(settings, temperature=temperature),
                samples=1,
                seed=derive_seed(work.seed, "answers"),
                finished=done,
            )
            with contextlib.closing(drawn):
                for (one,) in drawn:
                    text = one.text.strip()
                    journal.append({"id": one.prompt_id, "text": text, "finish": one.finish})
                    work.meter.count(
                        flops=2.0 * parameters * (one.prompt_tokens + one.generated_tokens),
                        prompt_tokens=one.prompt_tokens,
                        generated_tokens=one.generated_tokens,
                    )
                    bar.update()
                    work.stop.check()
    answers = _all(journal, len(asked))
    assert answers is not None, f"{path} lacks answers"
    return answers


def read_answers(path: str, instructions: Sequence[str]) -> list[str]:
    """The answers in a file of rows (``output`` or ``response``), found by their instructions.

    Raises:
        UserError: an instruction has no answer there, or two different ones.
    """
    found: dict[str, str] = {}
    for row in read_rows(path).require():
        text = task_text(row.instruction, row.input)
        if found.setdefault(text, row.response) != row.response:
            raise UserError(f"{path}: two answers to {text[:60]!r}: keep one of them")
    missing = [one for one in instructions if one not in found]
    if missing:
        raise UserError(
            f"{path}: no answer to {len(missing)} of the {len(instructions)} prompts, such as "
            f"{missing[0][:60]!r}: give a file of answers to these prompts"
        )
    return [found[one] for one in instructions]


def _key(
    fingerprint: str,
    asked: Sequence[Conversation],
    settings: SamplingConfig,
    work: Work,
    temperatures: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What answers depend on: their journal belongs to it."""
    drawn = {
        name: value for name, value in as_dict(settings).items() if name != "prompts_per_batch"
    }
    return {
        "student": fingerprint,
        "prompts": value_hash([list(one) for one in asked]),
        "settings": {**drawn, "dtype": compute_dtype(settings.dtype)},
        "temperatures": value_hash(temperatures or [settings.temperature] * len(asked)),
        "seed": work.seed,
    }


def _all(journal: Journal, count: int) -> list[str] | None:
    texts = {one["id"]: one["text"] for one in journal.records}
    return [texts[str(number)] for number in range(count)] if len(texts) == count else None
