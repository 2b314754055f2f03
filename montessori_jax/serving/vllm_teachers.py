"""Teachers served by vLLM, our own or a running one, and how a tuned one is handed over."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from montessori_jax.config import VllmConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.errors import UserError
from montessori_jax.generation.teacher import Teacher
from montessori_jax.models import Model
from montessori_jax.models.folder import read_head
from montessori_jax.serving.environment import api_key, environment_for
from montessori_jax.serving.memory import check_room
from montessori_jax.serving.probe import Probes, ProbeText, WrongWeights, check_hand_over
from montessori_jax.serving.served import Served, adapter_of
from montessori_jax.serving.servers import ManagedServer, RunningServer
from montessori_jax.serving.sidecar import Sidecar
from montessori_jax.serving.vllm import VllmGenerator
from montessori_jax.stopping import Stop

Say = Callable[[str], None]
Way = Literal["same", "adapter", "reload", "restart", "start"]
"""How a server comes to serve a model: it does already; by an adapter beside the base; by weights
taken in place; by a fresh process, where one ran before or not."""


@dataclass
class VllmTeachers:
    """Teachers on a vLLM of our own, one at a time; each is handed over to the server that runs.

    Attributes:
        settings: of the server.
        logs: folder for its logs.
        lora_rank: of adapters that teachers are tuned with; 0 for none.
        shared: training needs the server's accelerator.
        jax_fraction: share of a GPU that training takes.
        say: told what happens to the server.
        stop: looked at while it starts.
        handovers: how each teacher came to be served.
    """

    settings: VllmConfig
    logs: Path
    lora_rank: int
    shared: bool
    jax_fraction: float
    say: Say
    stop: Stop
    handovers: list[Way] = field(default_factory=list)
    _probes: Probes = field(default_factory=Probes)
    _managed: ManagedServer | None = None
    _serving: str = ""

    @property
    def server(self) -> ManagedServer:
        """The server; it may not have been started."""
        if self._managed is None:
            environment = environment_for(self.settings)
            sidecar = Sidecar(
                environment, self.settings, self.logs, self.lora_rank, self.say, self.stop
            )
            self._managed = ManagedServer(sidecar)
        return self._managed

    def teacher(self, source: str) -> Teacher:
        """Serve ``source``; a running server takes it over, and a probe checks that it did.

        Raises:
            UserError: the model or the server cannot be had, the server does not fit, or it does
                not serve these weights.
        """
        server = self.server
        served = Served.of(source, server.sidecar.dtype, self.say)
        texts = self._probes.of(served.folder.parent, served.fingerprint)
        ways = list(self._ways(served, bool(texts)))
        serving, self._serving = self._serving, ""
        for way, last in [(one, one == ways[-1]) for one in ways]:
            if not self._go(way, served):
                continue
            try:
                _probe(server, texts, server.sidecar.dtype, source, self.say)
            except WrongWeights as error:
                if last or self.settings.handover != "auto":
                    raise
                self.say(f"after the way '{way}': {error}; trying the next way")
                continue
            break
        else:
            raise UserError(
                f"vLLM cannot take {source} in place: set vllm.handover: auto to restart it"
            )
        self._serving = served.fingerprint
        self.handovers.append(way)
        if serving != served.fingerprint or way != "same":
            self.say(f"vLLM serves {source} ({way})")
        on_cpu = server.sidecar.environment.platform == "cpu"
        seeded = self.settings.seeds == "always" or (self.settings.seeds == "auto" and not on_cpu)
        return _teacher(
            served, server, self.settings, self._positions(served), server.sidecar.dtype, seeded
        )

    def check(self, source: str) -> None:
        """Refuse a server that cannot be had or cannot hold ``source``."""
        self._check_room(Served.of(source, self.server.sidecar.dtype, self.say))

    def release(self) -> None:
        """End a server that a training stage must not find on its accelerator."""
        stays = self.settings.stay_up == "always" or (
            self.settings.stay_up == "auto" and not self.shared
        )
        if not stays:
            self.close()

    def close(self) -> None:
        """End the server."""
        if self._managed is not None:
            self._managed.end()
        self._serving = ""

    def _ways(self, served: Served, probed: bool) -> Iterator[Way]:
        """The ways to serve a model that can be tried, the cheapest first."""
        server = self.server
        if server.folder is None or server.gone():
            yield "start"
            return
        if served.fingerprint == self._serving or served.source == server.base:
            yield "same"
        if self.settings.handover != "restart":
            adapter = adapter_of(served.folder)
            if adapter and adapter.base == server.base and adapter.rank <= self.lora_rank:
                yield "adapter"
            # On a CPU the packed head of tied embeddings keeps the old weights (vLLM 0.32); and
            # weights that no probe can check are not trusted to a live process.
            tied = served.head.config.tie_word_embeddings
            on_cpu = server.sidecar.environment.platform == "cpu"
            if probed and not (tied and on_cpu) and _same_shape(server.folder, served.folder):
                yield "reload"
        if self.settings.handover != "reload":
            yield "restart"

    def _go(self, way: Way, served: Served) -> bool:
        """Go one way; whether it led anywhere."""
        server = self.server
        if way == "same":
            if served.source == server.base:
                server.adapter = None  # the base is there beside the adapter
            return True
        if way == "adapter":
            adapter = adapter_of(served.folder)
            return adapter is not None and server.load_adapter(
                f"tuned-{len(self.handovers)}", adapter.folder
            )
        if way == "reload":
            return server.reload(served.folder, served.source)
        server.end()
        self._check_room(served)
        server.restart(served.folder, served.source)
        return True

    def _positions(self, served: Served) -> int:
        return self.settings.max_model_len or served.head.config.max_position_embeddings

    def _check_room(self, served: Served) -> None:
        sidecar = self.server.sidecar
        check_room(
            served.head.config,
            self._positions(served),
            self.settings,
            dtype=sidecar.dtype,
            platform=sidecar.environment.platform,
            jax_fraction=self.jax_fraction,
            beside_jax=self.shared and self.settings.stay_up == "always",
        )


@dataclass
class RunningVllmTeachers:
    """Teachers on a vLLM that someone else runs (``vllm.url``); it is never ended.

    It serves what it was started with, or takes weights in place where it was started in vLLM's
    development mode and can read their folder.
    """

    settings: VllmConfig
    say: Say
    stop: Stop
    handovers: list[Way] = field(default_factory=list)
    _probes: Probes = field(default_factory=Probes)

    def teacher(self, source: str) -> Teacher:
        """``source`` as the server writes it.

        Raises:
            UserError: no server answers, or it does not serve these weights and cannot take them.
        """
        server = self._find()
        dtype = self.settings.dtype if self.settings.dtype != "auto" else "bfloat16"
        served = Served.of(source, dtype, self.say)
        texts = self._probes.of(served.folder.parent, served.fingerprint)
        way: Way = "reload" if server.serve(served.folder) else "same"
        if way == "reload":
            unchecked = "" if texts else "; no probe of it was found, so this is not checked"
            self.say(f"vLLM at {server.url} took {source}{unchecked}")
        _probe(server, texts, dtype, source, self.say)
        self.handovers.append(way)
        positions = server.positions or served.head.config.max_position_embeddings
        seeded = self.settings.seeds != "never"
        return _teacher(served, server, self.settings, positions, dtype, seeded)

    def check(self, source: str) -> None:
        """Refuse a server that does not answer."""
        self._find()

    def release(self) -> None:
        """Its accelerator is not ours to free."""

    def close(self) -> None:
        """It goes on."""

    def _find(self) -> RunningServer:
        return RunningServer.find(self.settings, api_key(self.settings.api_key_env), self.stop)


def _teacher(
    served: Served,
    server: ManagedServer | RunningServer,
    settings: VllmConfig,
    positions: int,
    dtype: str,
    seeded: bool,
) -> Teacher:
    chat = ChatFormat(served.head.tokenizer, served.head.generation)
    return Teacher(
        name=served.source,
        fingerprint=served.fingerprint,
        generator=VllmGenerator(server, chat, settings, positions, seeded),
        back_end="vllm",
        chat=chat,
        positions=positions,
        parameters=Model(served.head.config).parameter_count(),
        computes_in=lambda asked: dtype,
        seeded=seeded,
    )


def _probe(
    server: ManagedServer | RunningServer,
    texts: list[ProbeText],
    dtype: str,
    source: str,
    say: Say,
) -> None:
    if not texts:
        return
    found = check_hand_over(server.url, server.key, server.model, texts, dtype=dtype, name=source)
    say(
        f"probe of {found.tokens} tokens: vLLM is {found.from_new:.1e} nats a token from the "
        f"trainer, tuning moved {found.moved:.1e}"
    )


def _same_shape(old: Path, new: Path) -> bool:
    """Whether two folders' weights fit the same program."""
    return read_head(old).config == read_head(new).config
