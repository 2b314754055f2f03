"""Whether a server will fit, told before it is started."""

import shutil
import subprocess

from montessori_jax.config import VllmConfig
from montessori_jax.errors import UserError
from montessori_jax.models import Model, ModelConfig
from montessori_jax.serving.environment import Platform

GIB = 1024**3
BYTES = {"float32": 4, "bfloat16": 2}


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of a model's parameters in ``dtype``."""
    return Model(config).parameter_count() * BYTES[dtype]


def cache_bytes(config: ModelConfig, positions: int, dtype: str) -> int:
    """Bytes of one sequence's keys and values: the least that vLLM starts with."""
    width = config.num_kv_heads * config.head_dim
    return 2 * config.num_layers * width * positions * BYTES[dtype]


def check_room(
    config: ModelConfig,
    positions: int,
    settings: VllmConfig,
    *,
    dtype: str,
    platform: Platform,
    jax_fraction: float,
    beside_jax: bool,
) -> None:
    """Refuse a server that cannot hold its weights and one sequence.

    Args:
        config: of the model to serve.
        positions: longest sequence.
        settings: of the server.
        dtype: what it computes in.
        platform: what it runs on.
        jax_fraction: share of a GPU that JAX takes.
        beside_jax: both are on the GPU at one time.

    Raises:
        UserError: with the sizes, and the setting to change.
    """
    shards = settings.tensor_parallel
    weights, cache = weight_bytes(config, dtype) // shards, cache_bytes(config, positions, dtype)
    if platform == "cpu":
        room = settings.kv_cache_gib * GIB
        if cache > room:
            raise UserError(
                f"vLLM cannot start: one sequence of {positions} positions takes "
                f"{_gib(cache)} of keys and values and vllm.kv_cache_gib is "
                f"{settings.kv_cache_gib:g}: raise it, or lower vllm.max_model_len"
            )
        free = available_memory()
        if free is not None and weights + room > free:
            raise UserError(
                f"vLLM cannot start: {_gib(weights)} of weights and {settings.kv_cache_gib:g} GiB "
                f"of cache exceed the {_gib(free)} of free memory: lower vllm.kv_cache_gib, or "
                "take a smaller model"
            )
        return
    if platform != "cuda":
        return  # a TPU's memory is not told apart from its process
    if beside_jax and settings.gpu_memory_utilization + jax_fraction > 1:
        raise UserError(
            f"vLLM and JAX cannot share the GPU: vllm.gpu_memory_utilization "
            f"{settings.gpu_memory_utilization:g} and jax_memory_fraction {jax_fraction:g} are "
            "more than 1 together: lower them, or set vllm.stay_up: auto to let them take turns"
        )
    total = gpu_memory(settings.devices)
    if total is not None and weights + cache // shards > settings.gpu_memory_utilization * total:
        raise UserError(
            f"vLLM cannot start: {_gib(weights)} of weights a GPU and {_gib(cache // shards)} for "
            f"one sequence of {positions} positions exceed {settings.gpu_memory_utilization:g} of "
            f"the GPU's {_gib(total)}: raise vllm.tensor_parallel, lower vllm.max_model_len, or "
            "take a smaller model"
        )


def available_memory() -> int | None:
    """Bytes that processes can still take on this host, where the system says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def gpu_memory(devices: str) -> int | None:
    """Bytes of the smallest of the NVIDIA GPUs named (all, if none is), where the driver says."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if devices:
        command.append(f"--id={devices}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(sizes) * 1024**2 if sizes else None


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
