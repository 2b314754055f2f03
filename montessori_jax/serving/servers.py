"""The servers that a `VllmGenerator` can ask: one of our own, or one that is running already."""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from montessori_jax.config import VllmConfig
from montessori_jax.errors import UserError
from montessori_jax.serving.requests import bearer, error_text
from montessori_jax.serving.sidecar import MODEL, Sidecar
from montessori_jax.stopping import Stop


def _client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=bearer(key), timeout=600.0)


Reload = Literal["done", "absent", "failed"]
"""What came of asking for a reload: the weights are in; no such call there; they may be mixed."""


def reload_weights(url: str, key: str, folder: Path) -> Reload:
    """Have a server take a folder's weights in place.

    By calls that vLLM offers in its development mode; the folder must have the served model's
    shapes. Nothing may be under way.
    """
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.absolute())}}
    with _client(url, key) as client:
        try:
            if client.post("/pause", params={"mode": "wait"}).status_code == 404:
                return "absent"
            client.post("/collective_rpc", json=body).raise_for_status()
            # Keys and values of the old weights.
            client.post("/reset_prefix_cache").raise_for_status()
        except httpx.HTTPError:
            return "failed"
        finally:
            with contextlib.suppress(httpx.HTTPError):
                client.post("/resume")
    return "done"


@dataclass
class ManagedServer:
    """Our own vLLM: started when it is first asked for, restarted with the weights it had.

    Attributes:
        sidecar: the process.
        folder: the Hugging Face folder that it serves; None while it serves none.
        base: whose weights these are, by the name that adapters know it by.
        adapter: the adapter on them, as (name in requests, folder); None without one.
    """

    sidecar: Sidecar
    folder: Path | None = None
    base: str = ""
    adapter: tuple[str, Path] | None = None
    starts: int = field(default=0, init=False)

    @property
    def url(self) -> str:
        return self.sidecar.url

    @property
    def key(self) -> str:
        return self.sidecar.key

    @property
    def model(self) -> str:
        return self.adapter[0] if self.adapter else MODEL

    def gone(self) -> str:
        if self.sidecar.alive():
            return ""
        return f"its process ended; the end of {self.sidecar.log}:\n{self.sidecar.tail()}\n"

    def revive(self, reason: str) -> None:
        """Restart it with the weights and the adapter that it had."""
        assert self.folder is not None
        self.sidecar.say(f"vLLM was lost: {reason}; restarting it")
        adapter = self.adapter
        self.restart(self.folder, self.base)
        if adapter is not None and not self.load_adapter(*adapter):
            raise UserError(
                f"vLLM took the adapter {adapter[1]} before and does not after a restart"
            )

    def restart(self, folder: Path, base: str) -> None:
        """Serve ``folder`` from a fresh process, without an adapter."""
        self.adapter, self.folder, self.base = None, folder, base
        self.sidecar.start(folder)
        self.starts += 1

    def reload(self, folder: Path, base: str) -> bool:
        """Take ``folder``'s weights in place; False where the server cannot (then restart it)."""
        if reload_weights(self.url, self.key, folder) != "done":
            return False
        self.folder, self.base, self.adapter = folder, base, None
        return True

    def load_adapter(self, name: str, folder: Path) -> bool:
        """Put an adapter beside the base under a ``name`` of its own and ask for it from now on.

        False where the server cannot.
        """
        body = {"lora_name": name, "lora_path": str(folder.absolute())}
        try:
            with _client(self.url, self.key) as client:
                answer = client.post("/v1/load_lora_adapter", json=body)
            problem = error_text(answer) if answer.is_error else ""
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__} {error}"
        if problem:
            self.sidecar.say(f"vLLM did not take the adapter {folder}: {problem}")
            return False
        self.adapter = (name, folder)
        return True

    def end(self) -> None:
        """End the process; the next `restart` starts another."""
        self.sidecar.end()
        self.folder, self.base, self.adapter = None, "", None


@dataclass
class RunningServer:
    """A vLLM that someone else runs (``vllm.url``): asked, waited for, never started or ended.

    ``root`` is what it was started with, ``positions`` its longest sequence (0: it does not say)
    and ``folder`` the weights that it was handed (None: those that it was started with).
    """

    url: str
    key: str = field(repr=False)
    model: str
    root: str
    positions: int
    settings: VllmConfig
    stop: Stop
    folder: Path | None = None

    @classmethod
    def find(cls, settings: VllmConfig, key: str, stop: Stop) -> "RunningServer":
        """The server at ``settings.url``, and the first model that it serves.

        Raises:
            UserError: it does not answer, refuses the key, or is no vLLM with a model.
        """
        url = settings.url.rstrip("/").removesuffix("/v1")
        try:
            answer = httpx.get(f"{url}/v1/models", headers=bearer(key), timeout=30.0)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(
                f"vllm.url {settings.url}: no server answers there ({type(error).__name__}); start "
                "it, or leave vllm.url empty to have one started"
            ) from None
        if answer.status_code in (401, 403):
            raise UserError(
                f"vllm.url {settings.url}: the server refuses the key: set {settings.api_key_env}"
            )
        try:
            about = answer.json()["data"][0]
            model, root = str(about["id"]), str(about.get("root") or "")
            positions = int(about.get("max_model_len") or 0)
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"vllm.url {settings.url}: /v1/models answers {answer.status_code} and names no "
                "model: is this a vLLM server?"
            ) from None
        return cls(url, key, model, root, positions, settings, stop)

    def serve(self, folder: Path) -> bool:
        """Have it serve ``folder``; whether it had to be handed the weights.

        What it was started with is trusted only where weights cannot have been changed since.

        Raises:
            UserError: it serves something else and cannot take the folder.
        """
        came = reload_weights(self.url, self.key, folder)
        if came == "done":
            self.folder = folder
            return True
        started_with = bool(self.root) and Path(self.root).absolute() == folder.absolute()
        if came == "absent" and started_with:
            return False
        mixed = " (its weights may be mixed now: restart it)" if came == "failed" else ""
        raise UserError(
            f"vllm.url {self.url} serves {self.root or 'another model'} and cannot take "
            f"{folder}{mixed}: start it with that folder, or with VLLM_SERVER_DEV_MODE=1 where it "
            "can read the folder"
        )

    def gone(self) -> str:
        return ""  # only asking tells

    def revive(self, reason: str) -> None:
        """Wait until it answers again, as long as a start may take."""
        began = time.monotonic()
        while time.monotonic() - began < self.settings.startup_seconds:
            self.stop.check()
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0).is_success:
                    if self.folder is not None:  # who restarted it knows nothing of these weights
                        self.serve(self.folder)
                    return
            except httpx.TransportError:
                pass
            time.sleep(1.0)
        raise UserError(
            f"vllm.url {self.url} was lost ({reason}) and does not answer for "
            f"{self.settings.startup_seconds:.0f} s; what was finished is kept: start the server "
            "and run the same command again"
        )
