"""A server that cannot fit is refused before it starts, with the numbers."""

import pytest

from montessori_jax.config import VllmConfig
from montessori_jax.errors import UserError
from montessori_jax.models import ModelConfig
from montessori_jax.serving import memory
from montessori_jax.serving.memory import GIB, cache_bytes, check_room, weight_bytes

# Llama-3-8B: 8.03 billion parameters, 128 KiB of keys and values a position in bfloat16.
LLAMA_8B = ModelConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=8192,
)  # fmt: skip


def check(platform: str, settings: VllmConfig, **changed) -> None:
    options = {"dtype": "bfloat16", "jax_fraction": 0.9, "beside_jax": False, **changed}
    check_room(LLAMA_8B, 8192, settings, platform=platform, **options)


def test_sizes_are_those_of_the_published_model():
    assert weight_bytes(LLAMA_8B, "bfloat16") == 2 * 8_030_261_248
    assert cache_bytes(LLAMA_8B, 1, "bfloat16") == 128 * 1024
    assert cache_bytes(LLAMA_8B, 8192, "bfloat16") == GIB


def test_on_a_cpu_the_cache_must_hold_a_sequence_and_the_host_must_hold_all(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * GIB)
    check("cpu", VllmConfig(kv_cache_gib=4))
    with pytest.raises(UserError, match=r"2\.0 GiB of keys and values and vllm.kv_cache_gib is 1"):
        check("cpu", VllmConfig(kv_cache_gib=1), dtype="float32")
    with pytest.raises(UserError, match=r"15\.0 GiB of weights and 6 GiB of cache exceed the 20"):
        check("cpu", VllmConfig(kv_cache_gib=6))


def test_the_host_says_how_much_memory_is_free():
    free = memory.available_memory()
    assert free is not None
    assert GIB < free < 2**50


def test_on_a_gpu_weights_and_a_sequence_must_fit_its_share(monkeypatch):
    monkeypatch.setattr(memory, "gpu_memory", lambda devices: 24 * GIB)
    check("cuda", VllmConfig())
    with pytest.raises(UserError, match=r"29\.9 GiB of weights a GPU and 2\.0 GiB"):
        check("cuda", VllmConfig(), dtype="float32")
    check("cuda", VllmConfig(tensor_parallel=2), dtype="float32")
    with pytest.raises(UserError, match=r"exceed 0\.5 of the GPU's 24\.0 GiB"):
        check("cuda", VllmConfig(gpu_memory_utilization=0.5))


def test_two_shares_of_one_gpu_must_add_up(monkeypatch):
    monkeypatch.setattr(memory, "gpu_memory", lambda devices: None)
    check("cuda", VllmConfig(gpu_memory_utilization=0.4), beside_jax=True, jax_fraction=0.6)
    with pytest.raises(UserError, match=r"0\.9 and jax_memory_fraction 0\.9 are more than 1"):
        check("cuda", VllmConfig(), beside_jax=True)
