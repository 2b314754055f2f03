"""The files held to the safetensors library, in both directions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from montessori_jax.errors import UserError
from montessori_jax.models import weights
from montessori_jax.models.families import family_of
from montessori_jax.models.shards import BLOCK_BYTES, Shards, write_shard
from montessori_jax.models.weights import to_params
from tests.models.tiny import CONFIG, state, torch_model

KINDS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
         ml_dtypes.float8_e5m2, np.int64, np.int32, np.int16, np.int8, np.uint8,
         np.bool_)  # fmt: skip


def random_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    tensors = {np.dtype(kind).name: (4 * rng.random((5, 3))).astype(kind) for kind in KINDS}
    return tensors | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float32)}


def test_tensors_that_the_library_wrote(tmp_path: Path):
    written = random_tensors()
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    names = sorted(written)
    save_file({name: written[name] for name in names[:6]}, files[0], {"format": "pt"})
    save_file({name: written[name] for name in names[6:]}, files[1])
    found = Shards(files)
    assert len(found) == len(written)
    assert set(list(found)[:6]) == set(names[:6])  # file by file
    for name, array in written.items():
        assert found[name].dtype == array.dtype
        assert found.shape(name) == found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def test_a_tensor_stays_valid_after_the_next_was_read(tmp_path: Path):
    written = {name: np.full((300, 1000), value, np.float32) for value, name in enumerate("abc")}
    save_file(written, tmp_path / "x.safetensors")
    found = Shards([tmp_path / "x.safetensors"])
    views = {name: found[name] for name in found}
    for name, array in written.items():
        assert np.array_equal(views[name], array)
    with pytest.raises(ValueError, match="read-only"):
        views["a"][0] = 1


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_the_library_reads_what_is_written(kind: type, tmp_path: Path):
    rng = np.random.default_rng(5)
    rows = 3 * BLOCK_BYTES // (4 * 700)  # in several blocks
    arrays = {
        "turned": rng.standard_normal((700, rows)).astype(np.float32).T,
        "vector": rng.standard_normal(11).astype(np.float32),
        "odd": rng.standard_normal((3, 5)).astype(np.float32),
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    write_shard(tmp_path / "x", shapes, iter(arrays.items()), np.dtype(kind))
    with safe_open(tmp_path / "x", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "x")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == kind
        assert np.array_equal(found[name], array.astype(kind)), name


def test_tensors_in_another_order_are_refused(tmp_path: Path):
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float32)}
    shapes = {name: array.shape for name, array in arrays.items()}
    with pytest.raises(ValueError, match=r"b .* comes where a"):
        write_shard(tmp_path / "x", shapes, reversed(arrays.items()), np.dtype(np.float32))


def test_a_dtype_that_numpy_lacks_is_named(tmp_path: Path):
    save_file({"w": np.zeros(4, np.uint8)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    changed = content.replace(b'"U8"', b'"F8_E8M0"')
    size = int.from_bytes(content[:8], "little") + len(changed) - len(content)
    padding = -size % 8
    header = changed[8 : 8 + size] + b" " * padding
    (tmp_path / "x.safetensors").write_bytes((size + padding).to_bytes(8, "little") + header)
    with open(tmp_path / "x.safetensors", "ab") as file:
        file.write(changed[8 + size :])
    with pytest.raises(UserError, match="w is stored as F8_E8M0, which is not read"):
        Shards([tmp_path / "x.safetensors"])["w"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_accelerator_gets_the_same_parameters(dtype, monkeypatch: pytest.MonkeyPatch):
    config = family_of(CONFIG | {"tie_word_embeddings": True}, "test")
    tensors = state(torch_model(CONFIG | {"tie_word_embeddings": True}))
    here = to_params(config, tensors, dtype=dtype)
    monkeypatch.setattr(weights, "_HostBuffer", weights._DeviceBuffer)
    there = to_params(config, tensors, dtype=dtype)
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert one.dtype == other.dtype == dtype
        assert jnp.array_equal(one, other)
