"""What ``auto`` stands for, and which models are held in bfloat16."""

import jax

from montessori_jax.config import EvaluationConfig, GenerationConfig, ResponseConfig, SamplingConfig
from montessori_jax.dtypes import compute_dtype, forward_dtype


def test_auto_is_bfloat16_on_accelerators(monkeypatch):
    assert SamplingConfig().dtype == "auto"
    assert [compute_dtype(one) for one in ("auto", "bfloat16")] == ["float32", "bfloat16"]
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert [compute_dtype(one) for one in ("auto", "float32")] == ["bfloat16", "float32"]


def test_models_are_loaded_in_bfloat16_only_where_every_use_computes_in_it(monkeypatch):
    narrow, usual = GenerationConfig(dtype="bfloat16"), ResponseConfig()
    assert forward_dtype(narrow, usual) == "float32"
    assert forward_dtype(narrow, ResponseConfig(dtype="bfloat16")) == "bfloat16"
    assert forward_dtype(EvaluationConfig()) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert forward_dtype(narrow, usual) == "bfloat16"
