"""Programs compiled for their chips, and what the result says: memory, arithmetic, collectives."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


def compile_program(program: Program, *, quick: bool = False) -> Compiled:
    """Trace and compile one program for its chips.

    ``quick`` has the compiler try less hard to make it fast: a fifth of the time (18 instead of
    90 s of processor time for a step of TinyLlama-1.1B on 16 chips), with the same collectives but
    for how they are merged, and 6% fewer bytes a chip there.
    """
    began = time.perf_counter()
    traced = program.trace()
    products = products_of(traced.jaxpr, program.trips)
    try:
        with (
            jax.set_mesh(program.mesh),
            _configured(EFFORT, -1.0 if quick else 0.0),
            _kept_nowhere(),
        ):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _needed(str(error)) + program.beside
        seconds = time.perf_counter() - began
        return Compiled(program, None, needed, products, 0.0, (), 0, seconds)
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        beside=program.beside,
    )
    text = compiled.as_text()
    return Compiled(
        program,
        memory,
        memory.total,
        products,
        float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        tuple(
            collectives(text, dict(program.mesh.shape), program.trips, across_slices(program.mesh))
        ),
        text.count('custom_call_target="tpu_custom_call"'),
        time.perf_counter() - began,
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
