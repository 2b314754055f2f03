"""Programs compiled for their chips, and what the result says: memory, arithmetic, collectives."""

import hashlib
import re
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from montessori_jax.plan.hlo import Collective, collectives
from montessori_jax.plan.products import Products, products_of
from montessori_jax.plan.programs import Program
from montessori_jax.plan.targets import GIB

SIZES = {"B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
EFFORT = "jax_exec_time_optimization_effort"  # from -1 to 1: how hard XLA tries
NEEDED = (
    r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm",
    r"\(([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])\)",
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip while a program runs.

    Attributes:
        arguments: what it is given.
        temporaries: what it needs in between.
        output: what it returns, less what is written over donated arguments.
        code: the program itself.
        beside: what the stage holds that is no argument.
    """

    arguments: int
    temporaries: int
    output: int
    code: int
    beside: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.output + self.code + self.beside


@dataclass(frozen=True)
class Compiled:
    """What is known of a program after it was compiled, or after it could not be.

    Attributes:
        program: which.
        memory: None where the compiler refused it.
        needed: bytes a chip would have to have, as far as is known.
        products: arithmetic of the traced program, all chips and all trips.
        xla_flops: XLA's own count for one chip, which takes the body of a loop once.
        collectives: of one run.
        kernels: custom kernels in it (Pallas).
        seconds: that compiling took on this host.
    """

    program: Program
    memory: Memory | None
    needed: int
    products: Products
    xla_flops: float
    collectives: tuple[Collective, ...]
    kernels: int
    seconds: float

    def fits(self, memory: float) -> bool:
        """Whether it was compiled and fits in so many bytes a chip."""
        return self.memory is not None and self.needed <= memory


@dataclass(frozen=True)
class Found:
    """What the compiler made of a program, whichever stage has it; fields as in `Compiled`.

    Attributes:
        sizes: bytes of one chip: arguments, temporaries, output, code; None where it was refused.
        needed: bytes that the compiler says it would have needed where it refused, else 0.
    """

    sizes: tuple[int, int, int, int] | None
    needed: int
    xla_flops: float = 0.0
    collectives: tuple[Collective, ...] = ()
    kernels: int = 0
    seconds: float = 0.0


def compile_program(
    program: Program, *, quick: bool = False, known: MutableMapping[str, Found] | None = None
) -> Compiled:
    """Trace and compile one program for its chips.

    ``quick`` has the compiler try less hard to make it fast: a fifth of the time (18 instead of
    90 s of processor time for a step of TinyLlama-1.1B on 16 chips), with the same collectives but
    for how they are merged, and 6% fewer bytes a chip there. ``known`` has what was found before
    of programs with the very same text, and gets what is found now.
    """
    began = time.perf_counter()
    traced = program.trace()
    products = products_of(traced.jaxpr, program.trips)
    with jax.set_mesh(program.mesh), _configured(EFFORT, -1.0 if quick else 0.0), _kept_nowhere():
        lowered = traced.lower()
        key = "" if known is None else _key(lowered.as_text(), program, quick)
        found = None if known is None else known.get(key)
        if found is None:
            found = _compiled(lowered, program)
            found = replace(found, seconds=time.perf_counter() - began)
            if known is not None:
                known[key] = found
    memory = Memory(*found.sizes, beside=program.beside) if found.sizes else None
    return Compiled(
        program,
        memory,
        memory.total if memory else found.needed + program.beside,
        products,
        found.xla_flops,
        found.collectives,
        found.kernels,
        found.seconds,
    )


def _key(text: str, program: Program, quick: bool) -> str:
    """Of all that decides what the compiler makes of a program, but for its version."""
    mesh = program.mesh
    chips = [(device.device_kind, str(device)) for device in mesh.devices.flat]
    whole = (text, program.trips, tuple(mesh.shape.items()), chips, quick)
    return hashlib.sha256(repr(whole).encode()).hexdigest()


def _compiled(lowered: jax.stages.Lowered, program: Program) -> Found:
    """Compile, and read what the compiler says."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Found(None, _needed(str(error)))
    stats, text = compiled.memory_analysis(), compiled.as_text()
    if stats is None or text is None:
        raise RuntimeError(f"no memory and no text of {program.stage}, {program.name}")
    return Found(
        (
            stats.argument_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.output_size_in_bytes - stats.alias_size_in_bytes,
            stats.generated_code_size_in_bytes,
        ),
        0,
        float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        tuple(
            collectives(text, dict(program.mesh.shape), program.trips, across_slices(program.mesh))
        ),
        text.count('custom_call_target="tpu_custom_call"'),
    )


def across_slices(mesh: jax.sharding.Mesh) -> tuple[str, int] | None:
    """The axis along which a mesh's slices differ, and how many there are; None with one."""
    found = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    for axis, name in enumerate(mesh.axis_names):
        if (found != found.take([0], axis)).any():
            return name, len(np.unique(found))
    return None


@contextmanager
def _kept_nowhere() -> Iterator[None]:
    """Compile without JAX's folder of programs: one for absent chips cannot be read back from it.

    Whether the folder is used JAX decides at its first program and remembers: hence the resets.
    """
    reset_cache()
    try:
        with _configured("jax_enable_compilation_cache", False):
            yield
    finally:
        reset_cache()


@contextmanager
def _configured(name: str, value: float | bool) -> Iterator[None]:
    """A setting of JAX's within a block."""
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _needed(message: str) -> int:
    """Bytes that the compiler says it would have needed; 0 where it does not."""
    for pattern in NEEDED:
        if found := re.search(pattern, message):
            return int(float(found[1]) * SIZES[found[2]])
    return 0
