"""What writes text: one protocol for the built-in sampler and for any server."""

from collections.abc import Collection, Sequence
from collections.abc import Generator as Yielding
from dataclasses import dataclass
from typing import Protocol

from montessori_jax.config import SamplingConfig
from montessori_jax.data.rows import Message
from montessori_jax.generation.endings import Finish


@dataclass(frozen=True)
class PromptRequest:
    """One prompt, and the number that keys its random draws.

    ``tokens`` are its ids; back-ends that have a tokenizer of their own are given ``messages``
    instead. ``pattern`` is a regular expression that the text must match; "" asks for none.
    """

    id: str
    tokens: tuple[int, ...]
    row: int
    messages: tuple[Message, ...] = ()
    pattern: str = ""


@dataclass(frozen=True)
class Completion:
    """One of a prompt's samples.

    ``text`` has neither the stop string nor control tokens; ``tokens`` run through the one that
    ended it, and are empty where a server keeps them to itself. ``finish`` is ``end`` (the model
    ended its turn), ``stop`` (``stop`` was written) or ``length``. ``prompt_tokens`` were read for
    it (a prompt's first sample has them all), ``generated_tokens`` written.
    """

    prompt_id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    finish: Finish
    prompt_tokens: int
    generated_tokens: int
    stop: str = ""


class Generator(Protocol):
    """Writes ``samples`` completions of every request."""

    def generate(
        self,
        requests: Sequence[PromptRequest],
        settings: SamplingConfig,
        *,
        samples: int,
        stop: tuple[str, ...],
        seed: int,
        finished: Collection[str] = (),
    ) -> Yielding[list[Completion], None, None]:
        """Yield the completions of some whole prompts as soon as they are done.

        ``finished`` are ids of prompts that are not asked again. Where the back-end can (see
        there), a completion is fixed by ``seed``, its request and its sample index: neither what
        it runs beside nor what is in ``finished`` changes it. Closing the generator drops what is
        under way.
        """
        ...
