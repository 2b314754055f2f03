"""Stage: a teacher writes instructions, filters keep the good ones, the teacher answers them.

Writes ``data.parquet`` with its card, ``prompts.jsonl`` (what the teacher was asked) and
``dropped.jsonl`` (what was not kept, and why). Resumes prompt by prompt.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from montessori_jax.config import (
    GenerationConfig,
    Price,
    ResponseConfig,
    SamplingConfig,
    as_dict,
)
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.rows import read_rows
from montessori_jax.data.writing import DatasetCard, write_dataset_card, write_jsonl
from montessori_jax.errors import UserError
from montessori_jax.generation.collapse import check_yield
from montessori_jax.generation.filters import FilterReport, FilterSettings, InstructionFilter
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.parsing import parse_instruction
from montessori_jax.generation.prompts import (
    Prompt,
    build_instruction_prompt,
    build_response_prompt,
    choose_exemplars,
    task_text,
)
from montessori_jax.generation.responses import finished_part
from montessori_jax.generation.teacher import Teacher
from montessori_jax.runs import Journal, value_hash
from montessori_jax.seeding import derive_seed
from montessori_jax.work import Work

COLUMNS = {
    "id": "candidate: prompt and sample",
    "prompt_id": "generation prompt; its candidates compete with each other",
    "instruction": "what the teacher asks the student to do",
    "response": "the teacher's answer",
    "response_finish": "how the answer ended: end, stop or length",
    "raw": "the teacher's text that the instruction was read from, word for word",
}


@dataclass(frozen=True)
class Asked:
    """One generation prompt and its number."""

    index: int
    prompt: Prompt

    @property
    def id(self) -> str:
        return f"p{self.index:05d}"

    def as_row(self) -> dict[str, Any]:
        prompt = self.prompt
        asked = prompt.messages if prompt.messages is not None else prompt.text
        return {"prompt_id": self.id, "prompt": asked, "prefill": prompt.prefill}


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
    journal: Journal,
    work: Work,
    *,
    samples: int,
    stop: tuple[str, ...],
    seed: int,
    label: str,
    total: int,
) -> dict[str, list[dict[str, Any]]]:
    """Completions by prompt id, journalled prompt by prompt; finished ones are not asked again."""
    finished = [one for record in journal.records for one in record["completions"]]
    done = {one["prompt_id"] for one in finished}
    batches = teacher.generator.generate(
        requests, settings, samples=samples, stop=stop, seed=seed, finished=done
    )
    price = teacher.price or Price()
    bar = work.bar(total, "text", label, done=len(finished))
    with bar, contextlib.closing(batches):
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
            finished += made
            prompted = sum(one.prompt_tokens for one in batch)
            generated = sum(one.generated_tokens for one in batch)
            work.meter.count(
                flops=2.0 * teacher.parameters * (prompted + generated),
                dollars=(price.prompt * prompted + price.generated * generated) / 1e6,
                prompt_tokens=prompted,
                generated_tokens=generated,
            )
            bar.update(len(batch))
            work.stop.check()
    asked = {request.id for request in requests}
    texts: dict[str, list[dict[str, Any]]] = {request.id: [] for request in requests}
    for one in finished:
        if one["prompt_id"] in asked:
            texts[one["prompt_id"]].append(one)
    for records in texts.values():
        records.sort(key=lambda record: record["index"])
    return texts


def generate(
    teacher: Teacher,
    seeds: str,
    settings: GenerationConfig,
    responses: ResponseConfig,
    work: Work,
    *,
    prompts: int,
) -> dict[str, Any]:
    """Ask ``prompts`` times for ``settings.samples`` instructions, filter, then ask for responses.

    Exemplars of a round of prompts come from the seeds and from what earlier rounds kept, so they
    are fixed by the prompt's number. A row's text is fixed by the seed, its prompt and its sample.

    Returns:
        Counts: ``candidates``, ``kept``, ``yield``, ``dropped`` by cause, ``rows`` with responses.

    Raises:
        UserError: too few seeds, or the share kept falls below ``settings.min_yield``.
    """
    pool = [
        task_text(r.instruction, r.input) for r in read_rows(seeds, need_response=False).require()
    ]
    pool = _short_enough(pool, teacher, settings, work)
    dtypes = {
        "instructions": teacher.computes_in(settings.dtype),
        "responses": teacher.computes_in(responses.dtype),
    }
    if not teacher.seeded:
        work.say(
            f"{teacher.back_end} takes no seeds here: another run writes other texts (this one "
            "keeps what it has)"
        )
    key = {
        "generator": teacher.back_end,
        "teacher": teacher.fingerprint,
        "seeds": value_hash(pool),
        "prompts": prompts,
        "seed": work.seed,
        "settings": as_dict(settings),
        "dtypes": dtypes,
    }
    journal = Journal(work.file("instructions.jsonl"), key)
    filters = InstructionFilter(FilterSettings.of(settings.filters), pool)
    report, dropped = FilterReport(), []
    kept: list[dict[str, Any]] = []
    asked: list[Asked] = []
    for first in range(0, prompts, settings.round_prompts):
        last = min(first + settings.round_prompts, prompts)
        earlier = [row["instruction"] for row in kept]
        questions = [
            Asked(
                index,
                build_instruction_prompt(
                    settings.style,
                    choose_exemplars(
                        pool,
                        earlier,
                        seed=derive_seed(work.seed, "exemplars"),
                        prompt_index=index,
                        num_seed=settings.seed_exemplars,
                        num_generated=settings.generated_exemplars,
                    ),
                ),
            )
            for index in range(first, last)
        ]
        asked += questions
        requests = [
            as_request(teacher, q.id, q.prompt, q.index, structured=settings.structured)
            for q in questions
        ]
        texts = sample(
            teacher,
            requests,
            settings,
            journal,
            work,
            samples=settings.samples,
            stop=questions[0].prompt.stop,
            seed=derive_seed(work.seed, "instructions"),
            label="instructions",
            total=prompts * settings.samples,
        )
        for question in questions:
            for record in texts[question.id]:
                parsed = parse_instruction(
                    record["text"],
                    style=settings.style,
                    prefill=question.prompt.prefill,
                    finish=record["finish"],
                )
                verdict = filters.offer(parsed)
                report.record(verdict)
                name = f"{question.id}-{record['index']}"
                if verdict.cause is not None:
                    dropped.append({"id": name, **asdict(verdict)})
                    continue
                kept.append(
                    {
                        "id": name,
                        "prompt_id": question.id,
                        "instruction": verdict.text,
                        "raw": record["text"],
                    }
                )
        check_yield(
            report,
            floor=settings.min_yield,
            min_attempts=min(32, prompts * settings.samples),
            style=settings.style,
            repetition_penalty=settings.repetition_penalty,
            max_tokens=settings.max_tokens,
        )
    if not kept:
        raise UserError(f"no instruction was kept of {report.attempts}: {report.to_dict()}")
    rows, unanswered = _respond(teacher, kept, responses, key, work)
    write_jsonl(work.file("prompts.jsonl"), [question.as_row() for question in asked])
    write_jsonl(work.file("dropped.jsonl"), [*dropped, *unanswered])
    result = {
        "prompts": prompts,
        "candidates": report.attempts,
        "kept": len(kept),
        "yield": round(report.yielded, 4),
        "dropped": {**dict(report.ordered()), "no_response": len(unanswered)},
        "rows": len(rows),
        "generator": teacher.back_end,
        "seeded": teacher.seeded,
        "dtypes": dtypes,
    }
    card = DatasetCard(
        title="Synthetic instruction data",
        description="Instructions and responses written by a teacher model from seed exemplars, "
        "for a student model to learn from or to be probed with.",
        columns=COLUMNS,
        made=(
            f"asked the teacher {prompts} times for {settings.samples} instructions "
            f"(style {settings.style})",
            "kept what parses and passes the filters, near-duplicates dropped at ROUGE-L "
            f"{settings.filters.rouge_threshold}",
            "asked the teacher for a response to each",
        ),
        counts={"candidates": report.attempts, "kept": len(kept)},
        seed=work.seed,
        models={"teacher": teacher.name},
    )
    write_dataset_card(work.folder, rows, card)
    return result


def _short_enough(
    pool: list[str],
    teacher: Teacher,
    settings: GenerationConfig,
    work: Work,
) -> list[str]:
    """Seeds of which a prompt full still leaves room for the answer; the others are reported."""
    chat = teacher.chat
    if chat is None or teacher.positions is None:
        return pool  # that server counts for itself, and has more room than prompts need
    room = teacher.positions - settings.max_tokens
    share = room // (settings.seed_exemplars + settings.generated_exemplars + 2)
    short = [text for text in pool if len(chat.encode_text(text)) <= share]
    if len(short) < len(pool):
        work.say(f"{len(pool) - len(short)} seeds of over {share} tokens are left out as exemplars")
    return short


def _respond(
    teacher: Teacher,
    kept: list[dict[str, Any]],
    settings: ResponseConfig,
    key: dict[str, Any],
    work: Work,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with a response, and the rows whose response was empty, with the cause."""
    journal = Journal(work.file("responses.jsonl"), {**key, "responses": as_dict(settings)})
    requests = [
        as_request(
            teacher,
            row["id"],
            build_response_prompt(row["instruction"]),
            derive_seed(0, row["id"]),
        )
        for row in kept
    ]
    texts = sample(
        teacher,
        requests,
        settings,
        journal,
        work,
        samples=1,
        stop=(),
        seed=derive_seed(work.seed, "responses"),
        label="responses",
        total=len(kept),
    )
    rows, unanswered = [], []
    for row in kept:
        (record,) = texts[row["id"]]
        text = finished_part(record["text"], record["finish"], settings.unfinished)
        if not text:
            unanswered.append(
                {"id": row["id"], "text": row["instruction"], "cause": "no_response", "detail": ""}
            )
            continue
        answered = {**row, "response": text, "response_finish": record["finish"]}
        rows.append({name: answered[name] for name in COLUMNS})
    if not rows:
        raise UserError("the teacher answered none of its instructions: look at responses.jsonl")
    return rows, unanswered
