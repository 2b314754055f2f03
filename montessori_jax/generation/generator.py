"""What writes text: one protocol for the built-in sampler and for any server."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from montessori_jax.config import SamplingConfig
from montessori_jax.generation.endings import Finish


@dataclass(frozen=True)
class PromptRequest:
    """One prompt: its token ids, and the number that keys its random draws."""

    id: str
    tokens: tuple[int, ...]
    row: int


@dataclass(frozen=True)
class Completion:
    """One of a prompt's samples.

    ``text`` has neither the stop string nor control tokens; ``tokens`` run through the one that
    ended it. ``finish`` is ``end`` (the model ended its turn), ``stop`` (``stop`` was written) or
    ``length``.
    """

    prompt_id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    finish: Finish
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
    ) -> Iterator[list[Completion]]:
        """Yield the completions of some whole prompts as soon as they are done.

        A completion is fixed by ``seed``, its request and its sample index: neither what it runs
        beside nor what is in ``finished`` (ids of prompts that are not asked again) changes it.
        """
        ...
