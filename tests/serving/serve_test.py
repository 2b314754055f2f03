"""`montessori serve`: a judge of one's own, by the command alone."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import httpx
import pytest

from montessori_jax.config import JudgeConfig
from montessori_jax.costs import Meter
from montessori_jax.serving.judge import Judge, Question
from montessori_jax.work import Work

ROOT = Path(__file__).parents[2]
SMALL = ("--port", "0", "--eager", "true", "--kv-cache-gib", "1", "--max-num-seqs", "4")


class Server:
    """The command in a process of its own, and what it has said so far."""

    def __init__(self, model: Path, logs: Path):
        command = [sys.executable, "-m", "montessori_jax.cli", "serve", str(model)]
        self.process = subprocess.Popen(
            [*command, "--logs", str(logs), "--restarts", "1", *SMALL],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.lines.put(line)

    def end(self) -> None:
        """Whatever it still does; all that it started ends with it."""
        self.process.kill()
        self.process.wait()
        self._reader.join(60)

    def until(self, wanted: str) -> str:
        """What it says up to a line with ``wanted``."""
        said = ""
        while wanted not in said:
            said += self.lines.get(timeout=300)
        return said


@pytest.fixture
def server(vllm, tiny_folder, tmp_path) -> Iterator[Server]:
    one = Server(tiny_folder, tmp_path / "logs")
    yield one
    one.end()


def found(pattern: str, said: str) -> str:
    match = re.search(pattern, said)
    assert match, said
    return match[1]


def test_it_judges_comes_back_and_ends(server, tmp_path, monkeypatch):
    said = server.until("Ctrl-C ends it")
    address = found(r"base_url: (\S+)", said)
    monkeypatch.setenv("VLLM_API_KEY", found(r"export VLLM_API_KEY=(\w+)", said))
    assert "seeds: false" in said  # vLLM of a CPU
    settings = JudgeConfig(
        address, found(r"model: (\S+)", said), "VLLM_API_KEY", retries=1, seeds=False
    )
    question = Question(({"role": "user", "content": "Which?"},), {"max_tokens": 4})
    work = Work(tmp_path, 0, Meter(None, "judge"), say=lambda text: None, quiet=True)
    [answer] = Judge.of(settings).ask([question], tmp_path / "j.jsonl", work, label="").values()
    assert answer.generated_tokens > 0

    [pid] = subprocess.run(
        ["pgrep", "-f", f"api_server.*--port {address.rsplit(':')[-1].removesuffix('/v1')}"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[-1:]  # fmt: skip
    os.kill(int(pid), signal.SIGKILL)
    again = server.until("Ctrl-C ends it")
    assert "vLLM ended; 1 restarts left" in again
    address = found(r"base_url: (\S+)", again)
    assert httpx.get(f"{address.removesuffix('/v1')}/health").is_success

    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/models", timeout=5)
