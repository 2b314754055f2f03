"""A small form of the training benchmark: every variant takes the same step."""

import numpy as np
import pytest

from benchmarks import training


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_all_variants_have_the_same_first_loss(kind: str) -> None:
    names = {
        "sft": ("sft:none", "torch-sft"),
        "dpo": ("dpo:none", "dpo-separate:none", "torch-dpo"),
    }
    results = [training.run_variant(name, "tiny", steps=1) for name in names[kind]]
    losses = [result["first_loss"] for result in results]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    for result in results:
        assert result["tokens_per_second"] > 0
        assert result["peak_memory_gib"] > 0
