"""Stage: a teacher writes instructions, filters keep the good ones, the teacher answers them.

Writes ``data.parquet`` with its card, ``prompts.jsonl`` (what the teacher was asked) and
``dropped.jsonl`` (what was not kept, and why). Resumes prompt by prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from montessori_jax.config import GenerationConfig, ResponseConfig, as_dict
from montessori_jax.data.rows import read_rows
from montessori_jax.data.writing import DatasetCard, write_dataset_card, write_jsonl
from montessori_jax.errors import UserError
from montessori_jax.generation.collapse import check_yield
from montessori_jax.generation.filters import FilterReport, FilterSettings, InstructionFilter
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
from montessori_jax.runs import SharedJournal, value_hash
from montessori_jax.seeding import derive_seed
from montessori_jax.stages.sample import as_request, sample
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


Question = Callable[[int, Sequence[str]], Prompt]
"""A prompt's number, and the instructions kept from earlier rounds -> the prompt."""


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
    exemplars = settings.seed_exemplars + settings.generated_exemplars
    pool = short_enough(pool, teacher, settings, work, exemplars=exemplars)

    def question(index: int, earlier: Sequence[str]) -> Prompt:
        chosen = choose_exemplars(
            pool,
            earlier,
            seed=derive_seed(work.seed, "exemplars"),
            prompt_index=index,
            num_seed=settings.seed_exemplars,
            num_generated=settings.generated_exemplars,
        )
        return build_instruction_prompt(settings.style, chosen)

    return write_data(
        teacher, pool, question, settings, responses, work, prompts=prompts, of="seed exemplars"
    )


def write_data(
    teacher: Teacher,
    pool: Sequence[str],
    question: Question,
    settings: GenerationConfig,
    responses: ResponseConfig,
    work: Work,
    *,
    prompts: int,
    of: str,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What `generate` writes, from the prompts that ``question`` makes.

    Args:
        teacher: writes.
        pool: instructions that none may be nearly the same as.
        question: makes the prompts; it must depend on its arguments and ``work.seed`` alone.
        settings: how instructions are drawn and filtered.
        responses: how responses are drawn.
        work: where to write.
        prompts: how many there are.
        of: what the prompts are made of, for the card.
        about: what else ``question`` depends on: a journal with another one is refused.
    """
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
        **about,
    }
    journal = SharedJournal(work.journals / "instructions.jsonl", key)
    filters = InstructionFilter(FilterSettings.of(settings.filters), pool)
    report, dropped = FilterReport(), []
    kept: list[dict[str, Any]] = []
    asked: list[Asked] = []
    for first in range(0, prompts, settings.round_prompts):
        last = min(first + settings.round_prompts, prompts)
        earlier = [row["instruction"] for row in kept]
        questions = [Asked(index, question(index, earlier)) for index in range(first, last)]
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
        for one in questions:
            for record in texts[one.id]:
                parsed = parse_instruction(
                    record["text"],
                    style=settings.style,
                    prefill=one.prompt.prefill,
                    finish=record["finish"],
                )
                verdict = filters.offer(parsed)
                report.record(verdict)
                name = f"{one.id}-{record['index']}"
                if verdict.cause is not None:
                    dropped.append({"id": name, **asdict(verdict)})
                    continue
                kept.append(
                    {
                        "id": name,
                        "prompt_id": one.id,
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
    write_jsonl(work.file("prompts.jsonl"), [one.as_row() for one in asked])
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
        description=f"Instructions and responses written by a teacher model from {of}, for a "
        "student model to learn from or to be probed with.",
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


def short_enough(
    pool: list[str],
    teacher: Teacher,
    settings: GenerationConfig,
    work: Work,
    *,
    exemplars: int,
) -> list[str]:
    """Seeds of which a prompt full still leaves room for the answer; the others are reported."""
    chat = teacher.chat
    if chat is None or teacher.positions is None:
        return pool  # that server counts for itself, and has more room than prompts need
    room = teacher.positions - settings.max_tokens
    share = room // (exemplars + 2)
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
    own = {**key, "responses": as_dict(settings)}
    journal = SharedJournal(work.journals / "responses.jsonl", own)
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
