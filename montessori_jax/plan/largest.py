"""The largest micro-batches, length and block of a plan, the other settings as they are."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from montessori_jax.config import RunConfig
from montessori_jax.data.packing import bucket
from montessori_jax.plan.search import Largest, largest
from montessori_jax.plan.stages import Recipe, Use

# Bytes of a chip that a recipe's program needs under some settings; infinite where not known.
Needed = Callable[[RunConfig, Recipe], float]


class Searched(NamedTuple):
    """A setting, its value, what has to fit with it, and the config with another value.

    ``step`` lies between values, ``most`` is the largest that changes anything.
    """

    name: str
    value: int
    recipes: Sequence[Recipe]
    change: Callable[[int], RunConfig]
    step: int = 1
    most: int | None = None


def find_largest(
    config: RunConfig,
    uses: Iterable[Use],
    needed: Needed,
    limit: float,
    *,
    ways: int,
    places: int,
) -> Iterator[Largest]:
    """The largest value of each setting that decides memory, of those whose present value fits.

    Args:
        config: the settings.
        uses: what an iteration does.
        needed: bytes of a chip.
        limit: bytes that a chip has.
        ways: into how many parts a batch's rows are split.
        places: over how many places candidates are split.
    """
    for one in _searched(config, uses, ways, places):
        # Rows are as long as their bucket.
        rounded = bucket if one.name.endswith("max_length") else int

        @cache
        def most_needed(value: int, one: Searched = one) -> float:
            changed = one.change(value)
            return max(needed(changed, recipe) for recipe in one.recipes)

        def measure(
            value: int,
            rounded: Callable[[int], int] = rounded,
            most_needed: Callable[[int], float] = most_needed,
        ) -> float:
            return most_needed(rounded(value))

        now = measure(one.value)
        if now > limit:
            continue
        found = largest(one.name, one.value, int(now), measure, limit, step=one.step, most=one.most)
        refused = found.too_large and rounded(found.too_large)
        yield replace(found, value=rounded(found.value), too_large=refused)


def _searched(config: RunConfig, uses: Iterable[Use], ways: int, places: int) -> Iterator[Searched]:
    recipes = list(dict.fromkeys(use.recipe for use in uses if use.amount))
    trained = [one for one in recipes if one == Recipe("train", "sft")]
    tuned = [one for one in recipes if one.kind == "dpo"]
    # Forward mode packs candidates into rows: it has no block.
    scored = [
        one for one in recipes if one.kind in ("score", "audit") and one.section != "linearized"
    ]

    def rows(section: str) -> Callable[[int], RunConfig]:
        own = getattr(config, section)
        return lambda value: replace(
            config, **{section: replace(own, micro_batch=value, batch_size=value * ways)}
        )

    if trained:
        # Lengths are whole blocks of the attention kernels.
        length = bucket(config.sft.max_length)
        yield Searched("sft.micro_batch", config.sft.micro_batch, trained, rows("sft"))
        yield Searched(
            "sft.max_length",
            length,
            trained,
            lambda value: replace(config, sft=replace(config.sft, max_length=value)),
            step=128,
        )
    if tuned:
        yield Searched("dpo.micro_batch", config.dpo.micro_batch, tuned, rows("dpo"))
    if scored:
        settings = config.influence
        yield Searched(
            "influence.block",
            settings.block or 1,
            scored,
            lambda value: replace(config, influence=replace(settings, block=value)),
            most=math.ceil(settings.chunk / places),
        )
