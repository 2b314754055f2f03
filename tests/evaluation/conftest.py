"""A tiny random Llama, by transformers and by us."""

import pytest

from montessori_jax.models import Model
from montessori_jax.models.families import family_of
from montessori_jax.models.weights import to_params
from tests.models.tiny import CONFIG, torch_model


@pytest.fixture(scope="module")
def student():
    theirs = torch_model(CONFIG)
    config = family_of(CONFIG, "test")
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return theirs, Model(config), to_params(config, tensors)
