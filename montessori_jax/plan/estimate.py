"""A first estimate of time and cost: arithmetic, memory and links at their published speeds."""

from dataclasses import dataclass

from montessori_jax.plan.hlo import Collective
from montessori_jax.plan.targets import Chip

# Shares of the published peaks that are assumed: for arithmetic (docs/gpu.md assumes the same) and
# for reading weights while decoding.
MFU, READING = 0.3, 0.5


@dataclass(frozen=True)
class Seconds:
    """Of one run of a program: arithmetic, reading weights, and talking at full speed, over the
    links within a slice and over the network between slices (None where its speed is not known).

    Talking is a lower bound: a ring along one axis does not use all links of a chip.
    """

    arithmetic: float
    reading: float
    links: float
    network: float | None = 0.0

    @property
    def total(self) -> float:
        """Nothing overlaps; what is not known is left out."""
        return max(self.arithmetic, self.reading) + self.links + (self.network or 0.0)


def seconds_of(
    flops: float, read: float, talk: tuple[Collective, ...], chip: Chip, chips: int, mfu: float
) -> Seconds:
    """Time of one run.

    Args:
        flops: of all chips, as a bfloat16 matrix unit counts them (`Products.unit`).
        read: bytes of weights that each chip reads.
        talk: what is sent.
        chip: of `montessori_jax.plan.targets`.
        chips: how many.
        mfu: the share of the published FLOP/s that is assumed.
    """
    within = sum(one.sent for one in talk if not one.between_slices)
    between = sum(one.sent for one in talk if one.between_slices)
    network = between / chip.network if chip.network else None
    return Seconds(
        flops / chips / chip.flops / mfu,
        read / chip.bandwidth / READING,
        within / chip.links if chip.links else 0.0,
        network if between else 0.0,
    )
