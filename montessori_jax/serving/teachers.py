"""Teachers behind servers, and which back-end a run uses."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from montessori_jax.config import RunConfig, UrlConfig, VllmConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.devices import local_platform
from montessori_jax.errors import UserError
from montessori_jax.generation.teacher import JaxTeachers, Teacher, Teachers
from montessori_jax.models import Model
from montessori_jax.models.folder import CONFIG, Head, read_head
from montessori_jax.models.sources import model_fingerprint
from montessori_jax.runs import value_hash
from montessori_jax.serving.chat import ChatGenerator
from montessori_jax.serving.environment import environment_for, find_environment
from montessori_jax.serving.memory import check_room
from montessori_jax.serving.probe import check_hand_over, read_probe
from montessori_jax.serving.served import adapter_of, servable
from montessori_jax.serving.servers import ManagedServer, RunningServer
from montessori_jax.serving.sidecar import Sidecar
from montessori_jax.serving.vllm import VllmGenerator
from montessori_jax.stopping import Stop

Say = Callable[[str], None]
BackEnd = Literal["jax", "vllm", "url"]


def choose_back_end(config: RunConfig) -> BackEnd:
    """What ``generator`` stands for here; asks for the accelerator only where it must."""
    if config.generator != "auto":
        return config.generator
    if config.vllm.url:
        return "vllm"
    if find_environment(config.vllm) is None or local_platform() == "cpu":
        return "jax"
    return "vllm"


def shares_accelerator(config: RunConfig, back_end: BackEnd) -> bool:
    """Whether a server of ours needs the accelerator that training needs."""
    if back_end != "vllm" or config.vllm.url:
        return False
    platform = environment_for(config.vllm).platform
    return platform == "tpu" or (platform == "cuda" and not config.vllm.devices)


def open_teachers(
    config: RunConfig, back_end: BackEnd, logs: Path, *, say: Say, stop: Stop
) -> Teachers:
    """What makes teachers in a run; nothing is started or loaded yet.

    Raises:
        UserError: the back-end lacks something, or settings need another one.
    """
    if config.generation.structured and back_end != "vllm":
        raise UserError(
            f"generation.structured needs vLLM and the generator is {back_end}: set generator: "
            "vllm, or generation.structured: false"
        )
    if back_end == "jax":
        return JaxTeachers(config.generation, config.responses)
    if back_end == "url":
        return UrlTeachers(config.url)
    return VllmTeachers(
        config.vllm,
        logs,
        lora_rank=config.dpo.lora_rank,
        shared=shares_accelerator(config, back_end),
        jax_fraction=config.jax_memory_fraction,
        say=say,
        stop=stop,
    )


def api_key(variable: str) -> str:
    """A key from the environment, or ""."""
    return os.environ.get(variable, "") if variable else ""


@dataclass
class UrlTeachers:
    """The model behind an address; it has no weights that could be handed over."""

    settings: UrlConfig

    def teacher(self, source: str) -> Teacher:
        key = api_key(self.settings.api_key_env)
        if not key and "api.openai.com" in self.settings.base_url:
            raise UserError(
                f"{self.settings.base_url} needs a key: set {self.settings.api_key_env}"
            )
        asked = [self.settings.base_url, self.settings.model]
        return Teacher(
            name=f"{self.settings.model} at {self.settings.base_url}",
            fingerprint=value_hash(asked),
            generator=ChatGenerator(self.settings, key),
            back_end="url",
            chat=None,
            positions=None,
            parameters=0,
            computes_in=lambda dtype: "unknown",
            price=self.settings.prices.get(self.settings.model),
            seeded=False,
        )

    def check(self, source: str) -> None:
        """There is nothing to check without asking."""

    def release(self) -> None:
        """Nothing here uses the accelerator."""

    def close(self) -> None:
        """Connections are closed with each stage."""


@dataclass
class VllmTeachers:
    """Teachers served by vLLM, one at a time; each is handed over to the server that runs.

    Attributes:
        settings: of the server.
        logs: folder for its logs.
        lora_rank: of adapters that teachers are tuned with; 0 for none.
        shared: training needs the server's accelerator.
        jax_fraction: share of a GPU that training takes.
        say: told what happens to the server.
        stop: looked at while it starts.
        handovers: how each teacher came to be served: ``start``, ``restart``, ``reload``,
            ``adapter`` or ``same``.
    """

    settings: VllmConfig
    logs: Path
    lora_rank: int
    shared: bool
    jax_fraction: float
    say: Say
    stop: Stop
    handovers: list[str] = field(default_factory=list)
    _managed: ManagedServer | None = None
    _serving: str = ""

    def teacher(self, source: str) -> Teacher:
        """Serve ``source``; a running server takes it over, and a probe checks that it did.

        Raises:
            UserError: the model or the server cannot be had, the server does not fit, or it does
                not serve these weights.
        """
        fingerprint = model_fingerprint(source)
        if self.settings.url:
            server: ManagedServer | RunningServer = self._running()
            dtype: str = self.settings.dtype if self.settings.dtype != "auto" else "bfloat16"
            seeded = self.settings.seeds != "never"
        else:
            server = self._own()
            dtype = server.sidecar.dtype
            on_cpu = server.sidecar.environment.platform == "cpu"
            seeded = self.settings.seeds == "always" or (
                self.settings.seeds == "auto" and not on_cpu
            )
        folder = servable(source, fingerprint, dtype, self.say)
        head = read_head(folder)
        positions = self.settings.max_model_len or head.config.max_position_embeddings
        if isinstance(server, RunningServer):
            positions = server.positions or positions
        self._serve(server, source, folder, fingerprint, head, positions)
        self._probe(server, folder, fingerprint, dtype, source)
        chat = ChatFormat(head.tokenizer, head.generation)
        return Teacher(
            name=source,
            fingerprint=fingerprint,
            generator=VllmGenerator(server, chat, self.settings, positions, seeded),
            back_end="vllm",
            chat=chat,
            positions=positions,
            parameters=Model(head.config).parameter_count(),
            computes_in=lambda asked: dtype,
            seeded=seeded,
        )

    def check(self, source: str) -> None:
        """Refuse a server that cannot be had or cannot hold ``source``."""
        if self.settings.url:
            self._running()
            return
        server = self._own()
        folder = servable(source, model_fingerprint(source), server.sidecar.dtype, self.say)
        head = read_head(folder)
        positions = self.settings.max_model_len or head.config.max_position_embeddings
        self._check_room(server, head, positions)

    def release(self) -> None:
        """End a server that a training stage must not find on its accelerator."""
        stays = self.settings.stay_up == "always" or (
            self.settings.stay_up == "auto" and not self.shared
        )
        if not stays:
            self.close()

    def close(self) -> None:
        """End the server, if it is ours."""
        if self._managed is not None:
            self._managed.end()
        self._serving = ""

    def _own(self) -> ManagedServer:
        if self._managed is None:
            environment = environment_for(self.settings)
            sidecar = Sidecar(
                environment, self.settings, self.logs, self.lora_rank, self.say, self.stop
            )
            self._managed = ManagedServer(sidecar)
        return self._managed

    def _running(self) -> RunningServer:
        return RunningServer.find(self.settings, api_key(self.settings.api_key_env), self.stop)

    def _serve(
        self,
        server: ManagedServer | RunningServer,
        source: str,
        folder: Path,
        fingerprint: str,
        head: Head,
        positions: int,
    ) -> None:
        """Have ``server`` serve the folder's weights, by the cheapest way that there is."""
        running = isinstance(server, RunningServer) or (
            server.folder is not None and not server.gone()
        )
        if running and self._serving == fingerprint:
            self.handovers.append("same")
            return
        self._serving = ""
        how = self._hand_over(server, source, folder, head, positions, running)
        self._serving = fingerprint
        self.handovers.append(how)
        self.say(f"vLLM serves {source} ({how})")

    def _hand_over(
        self,
        server: ManagedServer | RunningServer,
        source: str,
        folder: Path,
        head: Head,
        positions: int,
        running: bool,
    ) -> str:
        if isinstance(server, RunningServer):
            if server.serves(folder):
                return "same"
            if server.reload(folder):
                return "reload"
            raise UserError(
                f"vllm.url {server.url} serves {server.root or 'another model'} and cannot take "
                f"{folder}: start it with that folder, or with VLLM_SERVER_DEV_MODE=1 where it "
                "can read the folder"
            )
        if running and server.base == source and server.adapter is not None:
            server.adapter = None  # the base is there still
            return "same"
        if running and self.settings.handover != "restart":
            adapter = adapter_of(folder)
            if adapter and adapter[1] == server.base and 0 < adapter[2] <= self.lora_rank:
                server.load_adapter(f"tuned-{len(self.handovers)}", adapter[0])
                return "adapter"
            if _same_shape(server.folder, folder) and server.reload(folder, source):
                return "reload"
            if self.settings.handover == "reload":
                raise UserError(
                    f"vLLM cannot take {source} in place: set vllm.handover: auto to restart it"
                )
        if running:
            server.end()
        self._check_room(server, head, positions)
        server.restart(folder, source)
        return "restart" if running else "start"

    def _check_room(self, server: ManagedServer, head: Head, positions: int) -> None:
        check_room(
            head.config,
            positions,
            self.settings,
            dtype=server.sidecar.dtype,
            platform=server.sidecar.environment.platform,
            jax_fraction=self.jax_fraction,
            beside_jax=self.shared and self.settings.stay_up == "always",
        )

    def _probe(
        self,
        server: ManagedServer | RunningServer,
        folder: Path,
        fingerprint: str,
        dtype: str,
        source: str,
    ) -> None:
        texts = read_probe(folder.parent, fingerprint)
        if not texts:
            return
        found = check_hand_over(
            server.url, server.key, server.model, texts, dtype=dtype, name=source
        )
        self.say(
            f"probe of {found.tokens} tokens: vLLM is {found.from_new:.1e} nats a token from the "
            f"trainer, tuning moved {found.moved:.1e}"
        )


def _same_shape(old: Path | None, new: Path) -> bool:
    """Whether two folders' weights fit the same program."""
    if old is None:
        return False
    return (old / CONFIG).read_bytes() == (new / CONFIG).read_bytes()
