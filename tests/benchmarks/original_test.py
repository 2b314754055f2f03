"""The public code's procedure, as the benchmark has it, measures what `exact` measures."""

import jax
import numpy as np
import optax
import pytest

from benchmarks.original import original
from montessori_jax.config import InfluenceConfig
from montessori_jax.influence import score_candidates
from tests.influence.students import MODEL, chats, student


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_it_finds_what_exact_finds(tmp_path, clip):
    rate = 1e-2
    params, state, tx = student(rate)
    if clip:
        tx, state = optax.chain(optax.clip_by_global_norm(clip), tx), (optax.EmptyState(), state)
    rows, references = chats(2, 61), chats(11, 62)
    settings = InfluenceConfig(method="exact", reference_reduction="batch8", audit=0)
    scores = score_candidates(MODEL, params, state, tx, rows, references, settings)
    arrays = jax.device_get((params, state))
    found = original(tmp_path, MODEL.config, *arrays, rate, rows, references, clip)
    np.testing.assert_allclose(found["influence"], [one.influence for one in scores], rtol=1e-3)
    assert found["flops_per_candidate"] == pytest.approx(
        MODEL.parameter_count() * 1024 * (6 + 2 * len(references))
    )
