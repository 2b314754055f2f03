"""vLLM as a `Generator`: our token ids in, its token ids out, the text made of them by us."""

import asyncio
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from montessori_jax.config import SamplingConfig, VllmConfig
from montessori_jax.errors import UserError
from montessori_jax.generation.endings import Ending, Finish, Turns, find_ending
from montessori_jax.generation.generator import Completion, PromptRequest
from montessori_jax.serving.requests import Garbled, Patience, ServerLost, ask, open_client, stream

LOOK_SECONDS = 2.0
ENDS: dict[str, Finish] = {"stop": "end", "length": "length"}
"""The server's ``finish_reason`` -> ours, where the tokens do not tell."""
# Counters of vLLM's /metrics that grow while it works.
PROGRESS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


class Server(Protocol):
    """Where requests go, and what can be done when they are not answered."""

    @property
    def url(self) -> str:
        """``http://host:port`` without a path."""
        ...

    @property
    def key(self) -> str:
        """The bearer token, or ""."""
        ...

    @property
    def model(self) -> str:
        """The model's name in requests."""
        ...

    def gone(self) -> str:
        """Why the server cannot answer any more, as far as can be told without asking; or ""."""
        ...

    def revive(self, reason: str) -> None:
        """Make it answer again with the same weights, or raise `UserError`."""
        ...


@dataclass
class VllmGenerator:
    """A `Generator` on a vLLM server.

    Same definitions as the built-in sampler's (`montessori_jax.generation.sampling`), so equal
    settings mean the same. What differs: random draws are vLLM's own, keyed by a seed a sample
    (left out on CPUs, where it kills the server: those texts are new each time); in bfloat16, and
    where two tokens tie to within rounding, greedy text may part too.

    Attributes:
        server: where to ask.
        chat: decodes ids and knows which of them end a turn.
        settings: concurrency, retries, time limits.
        positions: longest sequence that the server takes.
        seeded: send a seed with each request.
    """

    server: Server
    chat: Turns
    settings: VllmConfig
    positions: int
    seeded: bool
    failures: int = field(default=0, init=False)

    def generate(
        self,
        requests: Sequence[PromptRequest],
        settings: SamplingConfig,
        *,
        samples: int,
        stop: tuple[str, ...] = (),
        seed: int,
        finished: Collection[str] = (),
    ) -> Generator[list[Completion], None, None]:
        """See `Generator.generate`; prompts come as they are done, in no order.

        A server that is lost is revived and asked again for what it had not answered, until
        ``settings.restarts`` losses in a row gave nothing.

        Raises:
            UserError: a prompt is empty or too long, the server refuses a request, or is lost for
                good.
        """
        for request in requests:
            self._check(request, settings)
        waiting = {one.id: one for one in requests if one.id not in finished}
        while waiting:
            try:
                for made in self._ask(list(waiting.values()), settings, samples, stop, seed):
                    del waiting[made[0].prompt_id]
                    self.failures = 0
                    yield made
            except ServerLost as lost:
                self.failures += 1
                if self.failures > self.settings.restarts:
                    raise UserError(
                        f"vLLM was lost {self.failures} times in a row without an answer between "
                        f"({lost}); what was finished is kept, and the same command goes on from "
                        "there"
                    ) from None
                self.server.revive(str(lost))

    def _check(self, request: PromptRequest, settings: SamplingConfig) -> None:
        if not request.tokens:
            raise UserError(f"prompt {request.id} is empty: give it at least one token")
        if len(request.tokens) + settings.max_tokens > self.positions:
            raise UserError(
                f"prompt {request.id} has {len(request.tokens)} tokens, and with max_tokens "
                f"{settings.max_tokens} it exceeds the {self.positions} positions that vLLM "
                "serves: lower max_tokens, raise vllm.max_model_len, or shorten the prompt"
            )

    def _ask(
        self,
        requests: Sequence[PromptRequest],
        settings: SamplingConfig,
        samples: int,
        stop: tuple[str, ...],
        seed: int,
    ) -> Generator[list[Completion], None, None]:
        patience = Patience(self.settings.retries, self.settings.request_seconds)
        client = open_client(self.server.url, self.server.key)

        async def one(request: PromptRequest) -> list[Completion]:
            body = self.body(request, settings, samples, stop, seed)
            return await ask(
                client,
                "/v1/completions",
                body,
                lambda answer: self.read(answer, request, settings, samples, stop),
                patience,
            )

        yield from stream(
            requests,
            one,
            concurrency=self.settings.concurrency,
            watch=lambda: self._watch(client),
            clean_up=client.aclose,
        )

    def body(
        self,
        request: PromptRequest,
        settings: SamplingConfig,
        samples: int,
        stop: tuple[str, ...],
        seed: int,
    ) -> dict[str, Any]:
        """The request's JSON: every setting said, so that no default of the server's counts."""
        body: dict[str, Any] = {
            "model": self.server.model,
            "prompt": list(request.tokens),
            "n": samples,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "presence_penalty": settings.presence_penalty,
            "frequency_penalty": settings.frequency_penalty,
            "repetition_penalty": settings.repetition_penalty,
            "stop": list(stop),
            "stop_token_ids": list(self.chat.stop_ids),
            "return_token_ids": True,
        }
        if settings.temperature == 0.0:
            # vLLM refuses several samples of greedy text, which would be one text anyway.
            body["n"] = 1
        if self.seeded:
            # vLLM adds the sample's index to it: a stride of n keeps requests' draws apart.
            body["seed"] = seed + request.row * samples
        if request.pattern:
            body["structured_outputs"] = {"regex": request.pattern}
        return body

    def read(
        self,
        answer: Any,
        request: PromptRequest,
        settings: SamplingConfig,
        samples: int,
        stop: tuple[str, ...],
    ) -> list[Completion]:
        """The completions in an answer; `Garbled` where they are not all there."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            ids = [[int(token) for token in choice["token_ids"]] for choice in choices]
            reasons = [str(choice["finish_reason"]) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise Garbled(f"{type(error).__name__}: {error}") from None
        if settings.temperature == 0.0 and len(ids) == 1:
            ids, reasons = ids * samples, reasons * samples
        if len(ids) != samples:
            raise Garbled(f"{len(ids)} choices where {samples} were asked for")
        made = []
        for index, (tokens, reason) in enumerate(zip(ids, reasons, strict=True)):
            if reason not in ENDS or not tokens:
                raise Garbled(f"a choice of {len(tokens)} tokens that ended by {reason!r}")
            ending = find_ending(
                tokens,
                self.chat.decode,
                stop_ids=self.chat.stop_ids,
                stop=stop,
                limit=settings.max_tokens,
            )
            if ending is None:
                # The server ended it for a reason that only it knows of: no room in its cache.
                ending = Ending(len(tokens), self.chat.decode(tokens), ENDS[reason])
            made.append(
                Completion(
                    prompt_id=request.id,
                    index=index,
                    tokens=tuple(tokens[: ending.used]),
                    text=ending.text,
                    finish=ending.finish,
                    prompt_tokens=0 if index else len(request.tokens),
                    generated_tokens=ending.used,
                    stop=ending.stop,
                )
            )
        return made

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """Raise `ServerLost` once the server is gone, or has made no token for too long."""
        limit, counted, since = self.settings.stall_seconds, -1.0, time.monotonic()
        look = min(LOOK_SECONDS, limit / 4)
        while True:
            await asyncio.sleep(look)
            if reason := self.server.gone():
                raise ServerLost(reason)
            count = await _tokens_handled(client, look)
            if count is not None and count != counted:
                counted, since = count, time.monotonic()
            if time.monotonic() - since > limit:
                raise ServerLost(f"no token for {limit:.0f} s (vllm.stall_seconds)")


async def _tokens_handled(client: httpx.AsyncClient, seconds: float) -> float | None:
    """Tokens that the server has handled so far; None where it does not answer."""
    try:
        answer = await client.get("/metrics", timeout=seconds)
    except httpx.RequestError:
        return None
    if answer.status_code == 404:  # switched off: then only requests' own time limits count
        return time.monotonic()
    counts = [
        float(line.rsplit(" ", 1)[1])
        for line in answer.text.splitlines()
        if line.startswith(PROGRESS)
    ]
    return sum(counts) if answer.is_success else None
