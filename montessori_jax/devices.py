"""What this host computes on, and where compiled programs are kept."""

import os
import subprocess
import sys
from functools import lru_cache

import jax

from montessori_jax.models.sources import cache_folder


@lru_cache
def local_platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: JAX's default backend, asked of another process.

    A process that has asked JAX itself holds the accelerator until it ends, and vLLM would find it
    taken.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu"
    ask = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.split()[-1] if done.returncode == 0 and done.stdout.split() else "cpu"


def keep_off_accelerator() -> None:
    """Have this process compute on the CPU: the accelerator is for others that it starts.

    Has no effect once JAX has made an array.
    """
    jax.config.update("jax_platforms", "cpu")


def cache_programs() -> None:
    """Keep compiled programs between stages and runs: most of a small run is compiling."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
