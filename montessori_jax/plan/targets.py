"""What can be planned for: chips by their makers' sheets, and how many of them."""

import re
from dataclasses import dataclass

from montessori_jax.costs import PEAK_FLOPS
from montessori_jax.errors import UserError

GIB = 2**30
TPU_SHEET = "docs.cloud.google.com/tpu/docs"
NVIDIA_SHEET = "the maker's data sheet"


@dataclass(frozen=True)
class Chip:
    """One chip as its maker publishes it.

    Attributes:
        kind: as JAX calls it, the key of `PEAK_FLOPS`.
        memory: bytes a program can have: what the TPU compiler allows, or a GPU's whole memory.
        bandwidth: bytes/s between memory and chip.
        links: bytes/s that leave the chip over all its links to chips of its slice (or host)
            together; 0 where there are none.
        network: bytes/s of a chip's share of the network between slices; 0 where its maker gives
            none.
        source: where the figures are from.
    """

    kind: str
    memory: float
    bandwidth: float
    links: float
    source: str
    network: float = 0.0

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]


TPUS = {
    # Memory: what libtpu 0.0.42.1 says it has when a program asks for more. Network: 6.4 (v5e) and
    # 25.6 Tbit/s (v6e) for a pod of 256 chips, 50 Gbit/s a chip (v5p), by the same pages.
    "v5e": Chip(
        "TPU v5e", 15.75 * GIB, 819e9, 200e9, f"{TPU_SHEET}/v5e (1,600 Gbit/s of ICI)", 25e9 / 8
    ),
    "v5p": Chip(
        "TPU v5p", 95.74 * GIB, 2765e9, 600e9, f"{TPU_SHEET}/v5p (4,800 Gbit/s of ICI)", 50e9 / 8
    ),
    "v6e": Chip(
        "TPU v6e", 31.25 * GIB, 1600e9, 400e9, f"{TPU_SHEET}/v6e (3,200 Gbit/s of ICI)", 100e9 / 8
    ),
}
GPUS = {
    "h100": Chip("NVIDIA H100", 80e9, 3.35e12, 450e9, f"{NVIDIA_SHEET} (SXM)"),
    "h200": Chip("NVIDIA H200", 141e9, 4.8e12, 450e9, f"{NVIDIA_SHEET} (SXM)"),
    "a100-80": Chip("NVIDIA A100", 80e9, 2.039e12, 300e9, f"{NVIDIA_SHEET} (SXM, 80 GB)"),
    "a100-40": Chip("NVIDIA A100", 40e9, 1.555e12, 300e9, f"{NVIDIA_SHEET} (SXM, 40 GB)"),
    "rtx4090": Chip("NVIDIA GeForce RTX 4090", 24e9, 1.008e12, 32e9, f"{NVIDIA_SHEET} (PCIe 4)"),
}
FORMS = (
    "v5e:4x4, v5p:2x2x1, v6e:4x4 (a TPU slice), v5e:4x4*2 (several), or a number of GPUs: "
    + ", ".join(f"{name}:8" for name in GPUS)
)


@dataclass(frozen=True)
class Target:
    """So many chips of one kind.

    Attributes:
        name: as the user gave it.
        chip: what each is.
        topology: of a slice, as the compiler takes it (``v5e:4x4``); None for GPUs.
        slices: TPU slices; they talk over the data-centre network.
        chips: in all.
    """

    name: str
    chip: Chip
    topology: str | None
    slices: int
    chips: int


def parse_target(name: str) -> Target:
    """``v5e:4x4``, ``v5e:4x4*2`` or ``h100:8`` as a `Target`.

    Raises:
        UserError: it has none of these forms, or the chip is not known.
    """
    kind, _, size = name.partition(":")
    if kind in GPUS and re.fullmatch(r"[1-9]\d*", size):
        return Target(name, GPUS[kind], None, 1, int(size))
    shape, _, times = size.partition("*")
    dimensions = 3 if kind == "v5p" else 2
    if (
        kind in TPUS
        and re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), shape)
        and re.fullmatch(r"([1-9]\d*)?", times)
        and ("*" in size) == bool(times)
    ):
        chips, slices = 1, int(times or 1)
        for part in shape.split("x"):
            chips *= int(part)
        return Target(name, TPUS[kind], f"{kind}:{shape}", slices, chips * slices)
    raise UserError(f"target '{name}' is not known; give {FORMS}")
