"""Where a text ends: at the model's end of turn, at a stop string, or at the length limit."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Finish = Literal["end", "stop", "length"]
"""How a text ended: the model ended its turn, a stop string was written, no room was left."""


class Turns(Protocol):
    """What the end of a text is told by; `montessori_jax.data.chat.ChatFormat` is one."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end the model's turn."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, control tokens left out."""
        ...


@dataclass(frozen=True)
class Ending:
    """``used`` tokens made ``text``; the last of them is the one that ended it."""

    used: int
    text: str
    finish: Finish
    stop: str = ""


def find_ending(
    tokens: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    *,
    stop_ids: Collection[int],
    stop: Sequence[str],
    limit: int,
) -> Ending | None:
    """How the text of ``tokens`` ends, or None while it goes on.

    The first token that ends it decides: one of ``stop_ids``, or the one that completes a stop
    string. If one token completes several stop strings, the leftmost in the text counts. The text
    has neither the stop string nor what follows it in the same token, nor a character of which the
    length limit cut off some bytes. The tokens are always decoded from the first on, since a
    character, and a stop string, may lie in several.

    Args:
        tokens: all that was generated so far.
        decode: text of a list of ids, control tokens left out.
        stop_ids: ids that end the model's turn.
        stop: strings that end the text; "" is none.
        limit: the most tokens that may be generated.
    """
    closing = next((place for place, token in enumerate(tokens) if token in stop_ids), None)
    written = tokens[:closing]
    text = decode(written)
    stop = [name for name in stop if name]
    if any(name in text for name in stop):
        # The fewest tokens whose text has a stop string: once it has, it keeps it.
        low, high = 1, len(written)
        while low < high:
            middle = (low + high) // 2
            shorter = decode(written[:middle])
            if any(name in shorter for name in stop):
                high = middle
            else:
                low = middle + 1
        text = decode(written[:low])
        place, _, name = min((text.find(name), -len(name), name) for name in stop if name in text)
        return Ending(low, text[:place], "stop", name)
    if closing is not None:
        return Ending(closing + 1, text, "end")
    if len(tokens) >= limit:
        # U+FFFD stands for the bytes of a character that has not all of them.
        return Ending(len(tokens), text.rstrip("\ufffd"), "length")
    return None
