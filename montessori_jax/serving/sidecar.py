"""vLLM's OpenAI-compatible server as a child process that cannot outlive us."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from montessori_jax.config import VllmConfig
from montessori_jax.errors import UserError
from montessori_jax.serving import guard
from montessori_jax.serving.environment import Environment
from montessori_jax.stopping import Stop

MODEL = "teacher"
"""What the model of a managed server is called in requests."""

TAIL_LINES, LAST_LINES = 8, 500
TELLING = re.compile(r"Error\b|\bERROR\b|CRITICAL")
GRACE_SECONDS = 10.0
# Ranks that vLLM has LoRA kernels for (its ``--max-lora-rank``).
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class Sidecar:
    """One server at a time, on loopback with a port and a key of its own.

    It runs under `montessori_jax.serving.guard` in its own process group, which ends with us
    however we end. Its output goes to ``logs/server-NN.log``.

    Attributes:
        environment: the Python that has vLLM.
        settings: of the server.
        logs: folder for its logs; the first free number is taken, so that restarts keep theirs.
        lora_rank: largest rank of adapters that it must take; 0 serves none.
        say: told when a server is started, with where its log is.
        stop: looked at while waiting for a start.
        key: what requests must carry.
        name: what the model is called in them.
        port: of loopback; 0 takes a free one at each start.
    """

    environment: Environment
    settings: VllmConfig
    logs: Path
    lora_rank: int = 0
    say: Callable[[str], None] = print
    stop: Stop = field(default_factory=Stop)
    key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    url: str = ""
    log: Path | None = None
    name: str = MODEL
    port: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def dtype(self) -> str:
        """What the server computes in."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        # On CPUs vLLM is slower in bfloat16.
        return "float32" if self.environment.platform == "cpu" else "bfloat16"

    def start(self, folder: Path) -> None:
        """Serve a Hugging Face folder; returns when the server answers.

        Raises:
            UserError: it ended or did not answer in time; with the tail of its log.
        """
        self.end()
        port = self.port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = self._next_log()
        self.say(f"starting vLLM {self.environment.version} with {folder} (log: {self.log})")
        guarded = [sys.executable, "-I", guard.__file__, str(GRACE_SECONDS)]
        with open(self.log, "wb") as output:
            self._process = subprocess.Popen(
                [*guarded, *self.command(folder, port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self.variables(),
            )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise

    def command(self, folder: Path, port: int) -> list[str]:
        """The server's command line. The module form: CPU builds have no metadata for ``serve``."""
        settings = self.settings
        command = [
            *(self.environment.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder.absolute()), "--served-model-name", self.name),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype),
            # What the model's folder proposes for sampling is not what was asked for.
            *("--generation-config", "vllm"),
            *("--tensor-parallel-size", str(settings.tensor_parallel)),
        ]
        if self.environment.platform == "cuda":
            command += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
        if settings.max_model_len:
            command += ["--max-model-len", str(settings.max_model_len)]
        if settings.max_num_seqs:
            command += ["--max-num-seqs", str(settings.max_num_seqs)]
        if settings.eager:
            command.append("--enforce-eager")
        if self.lora_rank:
            rank = next((one for one in LORA_RANKS if one >= self.lora_rank), self.lora_rank)
            command += ["--enable-lora", "--max-lora-rank", str(rank)]
        return [*command, *settings.arguments]

    def variables(self) -> dict[str, str]:
        """The server's environment variables."""
        own = {
            "VLLM_API_KEY": self.key,
            "VLLM_SERVER_DEV_MODE": "1",  # the calls that reload weights
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.lora_rank:
            own["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        if self.environment.platform == "cpu":
            own["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(self.settings.kv_cache_gib)))
        if self.settings.devices:
            own["CUDA_VISIBLE_DEVICES"] = self.settings.devices
        # JAX's own settings are not for it: a CPU-only parent must not make the server one.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("XLA_", "JAX_", "PYTHON")) and name != "VIRTUAL_ENV"
        }
        return {**inherited, **own}

    def keep(self, folder: Path, ready: Callable[[], None]) -> None:
        """Serve a folder until a stop is asked for; a server that ends is started again.

        ``ready`` is called whenever one answers.

        Raises:
            UserError: it cannot be started, or ended more often than ``settings.restarts``.
        """
        for left in range(self.settings.restarts, -1, -1):
            self.start(folder)
            ready()
            while self.alive():
                if self.stop.requested():
                    return
                time.sleep(0.25)
            self.say(f"vLLM ended; {left} restarts left; the end of {self.log}:\n{self.tail()}")
        raise UserError(f"vLLM ended {self.settings.restarts + 1} times: see {self.log}")

    def alive(self) -> bool:
        """Whether the server's process runs; it may still hang."""
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """End the server and all that it started."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # what the guard waits for
            try:
                process.wait(GRACE_SECONDS + 10)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def tail(self) -> str:
        """The last lines of the server's log that name errors; without any, the last lines."""
        lines = self._last_lines()
        telling = list(dict.fromkeys(line for line in lines if TELLING.search(line)))
        return "\n".join(f"  | {line[:300]}" for line in (telling or lines)[-TAIL_LINES:])

    def _last_lines(self) -> list[str]:
        if self.log is None or not self.log.exists():
            return ["(no log)"]
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return text.splitlines()[-LAST_LINES:]

    def _next_log(self) -> Path:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.logs}: cannot be made: {error.strerror}") from None
        number = len(list(self.logs.glob("server-*.log"))) + 1
        return self.logs / f"server-{number:02d}.log"

    def _wait(self) -> None:
        began, limit = time.monotonic(), self.settings.startup_seconds
        with httpx.Client(base_url=self.url, timeout=5.0) as client:
            while True:
                self.stop.check()
                if not self.alive():
                    raise UserError(
                        f"vLLM ended while it started; the end of {self.log}:\n{self.tail()}\n"
                        f"{advice(self._last_lines())}"
                    )
                with contextlib.suppress(httpx.TransportError, json.JSONDecodeError):
                    if client.get("/health").is_success:
                        break
                if time.monotonic() - began > limit:
                    raise UserError(
                        f"vLLM did not answer within {limit:.0f} s; raise vllm.startup_seconds, or "
                        f"see what it waits for; the end of {self.log}:\n{self.tail()}"
                    )
                time.sleep(0.25)
        self.say(f"vLLM answers after {time.monotonic() - began:.0f} s")


def advice(log: list[str]) -> str:
    """What to change, read off the end of a log."""
    lowered = "\n".join(line for line in log if TELLING.search(line)).lower()
    if "address already in use" in lowered:
        return "another process took the port: run it again"
    if re.search(r"out of memory|(free|available|allocate|enough) memory", lowered):
        return (
            "it ran out of memory: lower vllm.gpu_memory_utilization (vllm.kv_cache_gib on a CPU), "
            "vllm.max_model_len or vllm.max_num_seqs"
        )
    if "kv cache" in lowered:
        return "its cache is too small: lower vllm.max_model_len, or give the cache more memory"
    return "mend what it says, or set generator: jax"


def free_port() -> int:
    """A port on loopback that no one listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
