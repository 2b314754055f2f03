"""What compiling for absent chips leaves alone."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from montessori_jax.plan import analysis
from montessori_jax.plan.analysis import Found, compile_program
from montessori_jax.plan.programs import Program
from montessori_jax.plan.targets import parse_target
from montessori_jax.plan.topology import topology_devices
from tests.plan.libtpu import needs_libtpu

pytestmark = needs_libtpu


@pytest.fixture
def kept(tmp_path: Path):
    """A folder where JAX keeps every program that it compiles."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    reset_cache()
    for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def program(factor: int, target: str, beside: int = 0) -> Program:
    mesh = Mesh(np.asarray(topology_devices(parse_target(target))), ("data",))
    rows = jax.ShapeDtypeStruct(
        (8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )

    def trace():
        return jax.jit(lambda x: x * factor).trace(rows)

    return Program("sft", "step", "step", trace, mesh, 1, 1, beside=beside)


def test_a_program_of_the_same_text_and_chips_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    known: dict[str, Found] = {}
    first = compile_program(program(2, "v5e:2x2"), quick=True, known=known)
    texts = [*known]
    assert len(texts) == 1
    for other in (program(3, "v5e:2x2"), program(2, "v6e:2x2")):
        compile_program(other, quick=True, known=known)
    compile_program(program(2, "v5e:2x2"), known=known)
    assert len(known) == 4
    monkeypatch.setattr(analysis, "_compiled", None)
    jax.clear_caches()
    again = compile_program(program(2, "v5e:2x2", beside=5), quick=True, known=known)
    assert again.seconds == first.seconds
    assert again.memory == replace(first.memory, beside=5)
    assert again.needed == first.needed + 5


def test_programs_for_absent_chips_are_not_kept(kept: Path):
    """One that was kept cannot be loaded where no chip is, and JAX warns of it each time."""
    doubled = program(2, "v5e:2x2")
    jax.jit(lambda x: x + 3)(jnp.ones(4)).block_until_ready()
    ours = set(kept.iterdir())
    assert ours
    for _ in range(2):
        jax.clear_caches()
        assert compile_program(doubled, quick=True).needed > 0
    assert set(kept.iterdir()) == ours
    jax.jit(lambda x: x + 4)(jnp.ones(4)).block_until_ready()
    assert set(kept.iterdir()) > ours
