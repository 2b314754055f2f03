"""The sampler on several devices: the texts of one."""

from dataclasses import replace

import pytest

from montessori_jax.config import SamplingConfig
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sharding import laid_out
from tests.generation.sampler.asked import TEXT, requests, run, sampler
from tests.meshes import IDS, SHAPES, mesh_on

GREEDY = SamplingConfig(temperature=0.0, max_tokens=24, prompts_per_batch=3)


@pytest.fixture(scope="module")
def alone(tiny: LoadedModel):
    """Greedy and drawn texts of one device."""
    return run(sampler(tiny), requests(), GREEDY), run(sampler(tiny), requests(), TEXT)


@pytest.mark.parametrize("names", SHAPES, ids=IDS)
def test_on_every_mesh_texts_are_one_devices(names, tiny: LoadedModel, alone):
    params = laid_out(tiny.model, tiny.params, mesh_on(*names))
    spread = sampler(replace(tiny, params=params))
    greedy, drawn = alone
    assert run(spread, requests(), GREEDY) == greedy
    if "tensor" not in names:  # a draw may fall otherwise where sums are rounded otherwise
        assert run(spread, requests(), TEXT) == drawn
