"""The model that the sampler's tests write with."""

import pytest

from montessori_jax.models.folder import load_folder
from montessori_jax.models.loaded import LoadedModel
from tests.models.tiny import CONFIG, write_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama with room for 400 positions."""
    config = CONFIG | {"max_position_embeddings": 400, "tie_word_embeddings": True}
    return load_folder(write_folder(tmp_path_factory.mktemp("tiny"), config), name="tiny")
