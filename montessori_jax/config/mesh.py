"""How devices are arranged."""

from pydantic.dataclasses import dataclass

from montessori_jax.config.fields import STRICT, setting


@dataclass(frozen=True, config=STRICT)
class MeshConfig:
    """Devices by axis; their product is how many are used.

    An axis of 0 takes all that the others leave: influence has it in ``candidate``, all else in
    ``data``, and the other of the two is 1. On a CPU what is left is one device.
    """

    candidate: int = setting(
        0, "devices (or groups of them) that probe candidates of their own; elsewhere as data", ge=0
    )
    data: int = setting(0, "devices that work on rows of their own", ge=0)
    fsdp: int = setting(
        1, "devices that split every weight and its moments, and work on rows of their own", ge=1
    )
    tensor: int = setting(
        1, "devices that split every layer's heads, feed-forward and vocabulary", ge=1
    )
    sampler: int = setting(
        0,
        "devices that split the built-in sampler's teacher as tensor does; more than a host has: "
        "all hosts write each text together; 0: as tensor",
        ge=0,
    )
