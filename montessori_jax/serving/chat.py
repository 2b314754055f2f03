"""Any OpenAI-compatible address as a `Generator`: chat messages in, texts out."""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from montessori_jax.config import SamplingConfig, UrlConfig
from montessori_jax.errors import UserError
from montessori_jax.generation.endings import Finish
from montessori_jax.generation.generator import Completion, PromptRequest
from montessori_jax.serving.requests import Garbled, Patience, ServerLost, ask, open_client, stream

# The address' ``finish_reason`` -> ours.
ENDS: dict[str, Finish] = {"stop": "end", "length": "length", "content_filter": "end"}
# What only some of these servers know, and OpenAI's refuses.
EXTENSIONS = {"top_k": 0, "repetition_penalty": 1.0}


@dataclass
class ChatGenerator:
    """A `Generator` on ``/chat/completions``.

    Such servers have a tokenizer of their own and write whole turns: prompts must have messages and
    no prefill. Stop strings are looked for in the finished text, since these servers do not say
    whether one or the end of the turn ended it. Extensions that are at their neutral value are not
    sent, so that servers without them take the request. Seeds are sent (``seeds``); most servers
    only try to follow them.

    Attributes:
        settings: address, model, patience.
        key: bearer token; "" sends none.
    """

    settings: UrlConfig
    key: str = field(repr=False)

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

        Raises:
            UserError: a prompt has no messages, or the server refuses or does not answer.
        """
        for request in requests:
            if not request.messages or request.pattern:
                raise UserError(
                    "an address is asked by chat messages and writes its own turns: set "
                    "generation.style to chat and generation.structured to false"
                )
        waiting = [one for one in requests if one.id not in finished]
        client = open_client(self.settings.base_url.rstrip("/"), self.key)
        patience = Patience(self.settings.retries, self.settings.timeout_seconds)

        async def one(request: PromptRequest) -> list[Completion]:
            body = self.body(request, settings, samples, seed)
            return await ask(
                client,
                "/chat/completions",
                body,
                lambda answer: self.read(answer, request, samples, stop),
                patience,
            )

        try:
            yield from stream(
                waiting, one, concurrency=self.settings.concurrency, clean_up=client.aclose
            )
        except ServerLost as lost:
            raise UserError(
                f"{self.settings.base_url} does not answer ({lost}); what was finished is kept, "
                "and the same command goes on from there"
            ) from None

    def body(
        self,
        request: PromptRequest,
        settings: SamplingConfig,
        samples: int,
        seed: int,
    ) -> dict[str, Any]:
        """The request's JSON."""
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": list(request.messages),
            "n": samples,
            self.settings.tokens_field: settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "presence_penalty": settings.presence_penalty,
            "frequency_penalty": settings.frequency_penalty,
        }
        if self.settings.seeds:
            body["seed"] = (seed + request.row * samples) % 2**31
        for name, neutral in EXTENSIONS.items():
            if (value := getattr(settings, name)) != neutral:
                body[name] = value
        return body

    def read(
        self, answer: Any, request: PromptRequest, samples: int, stop: tuple[str, ...] = ()
    ) -> list[Completion]:
        """The completions in an answer; `Garbled` where they are not all there."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            texts = [choice["message"]["content"] or "" for choice in choices]
            reasons = [str(choice["finish_reason"]) for choice in choices]
            usage = answer.get("usage") or {}
            prompted = int(usage.get("prompt_tokens") or 0)
            generated = int(usage.get("completion_tokens") or 0)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Garbled(f"{type(error).__name__}: {error}") from None
        if not all(isinstance(text, str) for text in texts):
            raise Garbled("a choice whose content is no text")
        if len(texts) != samples:  # asking again would be paid again
            raise UserError(
                f"{self.settings.base_url} gave {len(texts)} texts where {samples} were asked for: "
                "it does not know 'n'; set generation.samples or judging.samples to 1"
            )
        share, rest = divmod(generated, samples)
        made = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            found = min(((text.find(one), one) for one in stop if one in text), default=None)
            made.append(
                Completion(
                    prompt_id=request.id,
                    index=index,
                    tokens=(),
                    text=text if found is None else text[: found[0]],
                    finish=ENDS.get(reason, "end") if found is None else "stop",
                    prompt_tokens=0 if index else prompted,
                    # Servers count all samples together.
                    generated_tokens=share + (rest if index == 0 else 0),
                    stop="" if found is None else found[1],
                )
            )
        return made
