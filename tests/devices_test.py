"""Where compiled programs are kept, shown by processes that compile."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What is compiled takes no two seconds, below which programs are not worth their file.
PROGRAM = """
import jax, jax.numpy as jnp
from montessori_jax.devices import cache_programs
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("compilation_cache/cache_hits") else 0
)
cache_programs()
print(jax.config.jax_persistent_cache_min_compile_time_secs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(len(hits))
"""


def compile_once(cache: Path, **variables: str) -> tuple[float, int]:
    """The shortest compilation that is kept, in seconds, and how many programs were found."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**environment, "MONTESSORI_CACHE": str(cache), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, hits = done.stdout.split()
    return float(seconds), int(hits)


def programs(folder: Path) -> set[str]:
    """The programs in a cache; when each was last read is noted beside it."""
    return {file.name for file in folder.glob("*-cache")}


def test_programs_are_kept_between_processes(tmp_path):
    assert compile_once(tmp_path) == (2.0, 0)
    kept = programs(tmp_path / "programs")
    assert kept
    _, hits = compile_once(tmp_path)
    assert hits == len(kept)
    assert programs(tmp_path / "programs") == kept


def test_jax_own_variable_wins(tmp_path):
    own = tmp_path / "own"
    seconds, _ = compile_once(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(own))
    assert programs(own)
    assert not (tmp_path / "ours").exists()
    assert seconds != 2.0  # nor is JAX's own threshold touched
