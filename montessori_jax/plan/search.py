"""The largest value of a setting that fits: a search that compiles few programs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

TRIES = 6  # programs that one search compiles at most
FURTHEST = 8  # times the largest that fits: what a flat line may promise


@dataclass(frozen=True)
class Largest:
    """What a search found.

    Attributes:
        setting: which one.
        value: the largest that was compiled and fits.
        bytes: what a chip then needs.
        too_large: the smallest that was compiled and does not fit; None where none was met. Where
            it is one step above ``value``, nothing larger fits.
        enough: whether a larger value would change nothing.
    """

    setting: str
    value: int
    bytes: int
    too_large: int | None = None
    enough: bool = False


def largest(
    setting: str,
    value: int,
    needed: int,
    measure: Callable[[int], float],
    limit: float,
    *,
    step: int = 1,
    tries: int = TRIES,
    most: int | None = None,
) -> Largest:
    """The largest value that was measured to fit, in at most ``tries`` measurements.

    Bytes are taken to grow in a line: the next value is where the line through the two nearest to
    the limit meets it, and the one above that to be sure. Where the line was wrong, or there is
    none yet, it is twice the largest that fits, or halfway to what does not.

    Args:
        setting: its name.
        value: the one at hand, which fits.
        needed: its bytes.
        measure: value -> bytes; infinite where the compiler does not say how many.
        limit: bytes that there are.
        step: between values that are tried.
        tries: how often ``measure`` may be called.
        most: the largest value that is of use; it is not gone beyond.
    """
    ceiling = math.inf if most is None else max(most, value)
    known: dict[int, float] = {value: needed}
    refused: int | None = None
    straight = True
    for _ in range(tries):
        best = max(one for one in known if known[one] <= limit)
        if best >= ceiling or (refused is not None and refused <= best + step):
            break
        guess = _meets(known, best, refused, limit) if straight else None
        if guess is None:
            guess = 2 * best if refused is None else (best + refused) // 2
        new = max(min(guess, FURTHEST * best) // step * step, best + step)
        if refused is not None and new >= refused:
            new = refused - step
        new = int(min(new, ceiling))
        known[new] = measure(new)
        if known[new] > limit:
            refused, straight = new, math.isfinite(known[new])
        elif len(known) > 2:
            # One step that fits: the line was too careful. A refusal without a number: too bold.
            numbered = refused is None or math.isfinite(known[refused])
            straight = numbered and new > best + step
    best = max(one for one in known if known[one] <= limit)
    return Largest(setting, best, int(known[best]), refused, best >= ceiling)


def _meets(known: dict[int, float], best: int, refused: int | None, limit: float) -> int | None:
    """Where the line through the two values nearest to the limit meets it; None without a line."""
    fits = sorted(one for one in known if known[one] <= limit)
    if refused is not None and math.isfinite(known[refused]):
        other = refused
    elif len(fits) > 1:
        other = fits[-2]
    else:
        return None
    slope = (known[other] - known[best]) / (other - best)
    return best + math.floor((limit - known[best]) / slope) if slope > 0 else None
