"""A real server that is lost, hangs, refuses or babbles: no text lost, none twice, one clear error.

What a healthy server would not do, a proxy in front of it does.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from montessori_jax.config import FilterConfig, GenerationConfig, ResponseConfig, SamplingConfig
from montessori_jax.costs import Meter
from montessori_jax.errors import UserError
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.prompts import build_instruction_prompt
from montessori_jax.generation.teacher import Teacher
from montessori_jax.serving.servers import ManagedServer
from montessori_jax.serving.vllm import VllmGenerator
from montessori_jax.stages.generate import generate
from montessori_jax.stages.sample import as_request
from montessori_jax.work import Work
from tests.serving.conftest import SETTINGS, open_vllm
from tests.serving.guard_test import running
from tests.serving.proxy import Proxy

ROOT = Path(__file__).parents[2]
GREEDY = SamplingConfig(temperature=0.0, max_tokens=16)
LONG = SamplingConfig(temperature=1.0, max_tokens=700)


@dataclass
class Behind:
    """A server whose requests go through a proxy."""

    server: ManagedServer
    proxy: Proxy
    revived: int = 0

    @property
    def url(self) -> str:
        return self.proxy.url

    @property
    def key(self) -> str:
        return self.server.key

    @property
    def model(self) -> str:
        return self.server.model

    def gone(self) -> str:
        return self.server.gone()

    def revive(self, reason: str) -> None:
        self.revived += 1


def through(served: Teacher, proxy: Proxy, **settings) -> VllmGenerator:
    generator = served.generator
    server = Behind(generator.server, proxy)
    return replace(generator, server=server, settings=replace(SETTINGS, **settings))


@pytest.fixture
def requests(served) -> list[PromptRequest]:
    prompts = [build_instruction_prompt("turns", [f"Name {n} towns."]) for n in range(10)]
    return [as_request(served, f"p{i}", prompt, i) for i, prompt in enumerate(prompts)]


def texts(generator, requests, settings=GREEDY, samples=1) -> dict[str, list]:
    found: dict[str, list] = {}
    for made in generator.generate(requests, settings, samples=samples, seed=0):
        assert made[0].prompt_id not in found, "a prompt was answered twice"
        found[made[0].prompt_id] = made
    return found


def test_faulty_answers_are_asked_for_again(served, proxy, requests):
    proxy.faults = ["429", "html", "500", "drop", "short", "503", "", "html"]
    found = texts(through(served, proxy), requests)
    assert found == texts(served.generator, requests)
    assert len(proxy.asked) == len(requests) + 7


def test_retries_are_capped_and_the_error_says_what_was_answered(served, proxy, requests):
    proxy.always = "500"
    generator = through(served, proxy, retries=1, restarts=0)
    with pytest.raises(UserError, match=r"lost 1 times .*after 2 attempts: 500 later, please"):
        texts(generator, requests[:1])
    assert len(proxy.asked) == 2
    proxy.always = "html"
    with pytest.raises(UserError, match=r"an answer that is no JSON \('<html>busy</html>'\)"):
        texts(through(served, proxy, retries=1, restarts=0), requests[:1])
    assert generator.server.revived == 0


def test_a_server_that_hangs_is_noticed_and_what_it_owes_is_asked_again(served, proxy, requests):
    proxy.faults = ["", "", "hang", "hang"]
    generator = through(served, proxy, stall_seconds=3, restarts=1)
    began = time.monotonic()
    assert texts(generator, requests) == texts(served.generator, requests)
    assert 3 < time.monotonic() - began < 60
    assert generator.server.revived == 1
    asked = Counter(tuple(body["prompt"]) for body in proxy.asked)
    assert sorted(asked.values()) == [1] * 8 + [2, 2]


def test_a_request_has_its_own_time_limit(served, proxy, requests):
    proxy.faults = ["hang"]
    generator = through(served, proxy, request_seconds=2)
    assert texts(generator, requests[:2]) == texts(served.generator, requests[:2])
    assert generator.server.revived == 0


# Only from here on is the server itself harmed: these tests have one of their own.


def descendants(pid: int) -> list[int]:
    """A process' children, their children and so on."""
    every = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = [tuple(map(int, line.split())) for line in every.stdout.splitlines()]
    own = [child for child, parent in parents if parent == pid]
    return [*own, *(one for child in own for one in descendants(child))]


def processes_of(server: ManagedServer) -> list[int]:
    """vLLM, its engine and their helpers, without the guard."""
    return descendants(server.sidecar._process.pid)


def assert_running(pids: list[int], want: bool) -> None:
    """All of them run, or within half a minute none of them does."""
    deadline = time.monotonic() + (0 if want else 30)
    while not want and any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in pids if running(pid)] == (pids if want else [])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_server_is_restarted_in_the_middle_of_a_batch(how, vllm, tiny_folder, tmp_path):
    # Two prompts at a time, so that most are still to come when the first is read.
    settings = replace(SETTINGS, concurrency=2, stall_seconds=12, restarts=2)
    teachers = open_vllm(tmp_path, settings)
    try:
        teacher = teachers.teacher(str(tiny_folder))
        server = teacher.generator.server
        prompts = [build_instruction_prompt("turns", [f"Name {n} towns."]) for n in range(24)]
        asked = [as_request(teacher, f"p{i}", one, i) for i, one in enumerate(prompts)]
        first = processes_of(server)
        found: dict[str, list] = {}
        for made in teacher.generator.generate(asked, LONG, samples=2, seed=0):
            assert made[0].prompt_id not in found
            if not found:
                for pid in first:
                    os.kill(pid, how)
            found[made[0].prompt_id] = made
        assert len(found) == 24
        assert server.starts == 2
        assert_running(first, False)
        assert sorted(path.name for path in tmp_path.glob("*.log")) == [
            "server-01.log", "server-02.log",
        ]  # fmt: skip
        last = processes_of(server)
        assert_running(last, True)
    finally:
        teachers.close()
    assert_running(last, False)


def test_a_start_that_runs_out_of_memory_shows_the_log_and_what_to_change(
    vllm, tiny_folder, tmp_path
):
    teachers = open_vllm(tmp_path, replace(SETTINGS, kv_cache_gib=100_000))
    with pytest.raises(UserError, match=r"100000 GiB of cache exceed the .* of free memory"):
        teachers.teacher(str(tiny_folder))
    sidecar = teachers.server.sidecar
    with pytest.raises(UserError, match=r"vLLM ended while it started.*\n  \| .*\n") as raised:
        sidecar.start(tiny_folder)
    assert "lower vllm.gpu_memory_utilization (vllm.kv_cache_gib on a CPU)" in str(raised.value)
    assert not sidecar.alive()


def test_a_start_that_takes_too_long_is_ended(vllm, tiny_folder, tmp_path):
    teachers = open_vllm(tmp_path, replace(SETTINGS, startup_seconds=1))
    with pytest.raises(UserError, match=r"did not answer within 1 s; raise vllm\.startup_"):
        teachers.teacher(str(tiny_folder))
    assert not teachers.server.sidecar.alive()


KEEP_ALL = FilterConfig(
    min_words=0, max_words=1000, keywords=(), rouge_threshold=1.0, allow_punctuation_start=True,
    allow_non_ascii_start=True,
)  # fmt: skip
STAGE = GenerationConfig(
    style="turns", samples=2, round_prompts=8, seed_exemplars=1, generated_exemplars=0,
    max_tokens=24, min_yield=0.0, filters=KEEP_ALL,
)  # fmt: skip
ANSWERS = ResponseConfig(max_tokens=8, unfinished="keep")


def run_stage(teacher: Teacher, folder: Path, prompts: int = 8) -> dict:
    work = Work(folder, 0, Meter(None, "generate"), say=lambda text: None, quiet=True)
    return generate(teacher, "package:seeds", STAGE, ANSWERS, work, prompts=prompts)


def journal(folder: Path, name: str = "instructions.jsonl") -> list[tuple[str, int]]:
    """(prompt, sample) of every completion in a journal, in the order of its lines."""
    lines = (folder / name).read_text().splitlines()[1:]
    return [
        (one["prompt_id"], one["index"])
        for line in lines
        for one in json.loads(line)["completions"]
    ]


def test_a_full_disk_loses_nothing_that_was_written(served, proxy, tmp_path, monkeypatch):
    teacher = replace(served, generator=through(served, proxy, concurrency=3))
    real, written = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal written
        written += 1
        if written > 4:  # the journal's first line, and three prompts
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"instructions.jsonl: cannot be written: No space"):
            run_stage(teacher, tmp_path)
    kept = journal(tmp_path)
    # By another way, for what was under way when it failed may still reach the first one.
    again = Proxy(lambda: served.generator.server.url)
    try:
        teacher = replace(served, generator=through(served, again, concurrency=3))
        result = run_stage(teacher, tmp_path)
        every = journal(tmp_path)
        assert every[: len(kept)] == kept
        assert sorted(every) == [(f"p{i:05d}", n) for i in range(8) for n in range(2)]
        assert len(again.asked) == (16 - len(kept)) // 2 + result["kept"]
        # The same again asks nothing: it is all there.
        run_stage(teacher, tmp_path)
        assert len(again.asked) == (16 - len(kept)) // 2 + result["kept"]
    finally:
        again.close()


def test_our_own_death_ends_the_server_and_the_same_command_goes_on(vllm, tiny_folder, tmp_path):
    out = tmp_path / "out"
    settings = [
        *("generate", "--teacher", tiny_folder, "--generator", "vllm", "--out", out, "--quiet"),
        *("--vllm-eager", "true", "--vllm-kv-cache-gib", "1", "--vllm-max-num-seqs", "2"),
        *("--style", "turns", "--prompts", "12", "--samples", "2", "--max-tokens", "200"),
        *("--min-yield", "0", "--filter-rouge-threshold", "1", "--filter-min-words", "0"),
        *("--seed-exemplars", "1", "--generated-exemplars", "0", "--response-max-tokens", "8"),
    ]
    command = [sys.executable, "-m", "montessori_jax.cli", *map(str, settings)]
    lines = out / "instructions.jsonl"
    with open(tmp_path / "log", "w") as log:
        ours = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not lines.exists() or len(lines.read_text().splitlines()) < 3:
            assert ours.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = descendants(ours.pid)
        assert len(pids) >= 2
        ours.kill()
        ours.wait()
    kept = journal(out)
    assert_running(pids, False)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every = journal(out)
    assert every[: len(kept)] == kept
    assert sorted(every) == [(f"p{i:05d}", n) for i in range(12) for n in range(2)]
    assert_running(pids, False)
