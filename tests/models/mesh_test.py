"""Weights onto a mesh and back: each device gets its part, and files come out as they went in."""

import jax
import numpy as np
import pytest

from montessori_jax.models.folder import load_folder, save_folder
from montessori_jax.models.sharding import param_shardings
from montessori_jax.models.sources import load_model
from tests.meshes import mesh_on
from tests.models.tiny import CONFIG, write_folder

MESHES = [("fsdp",), ("tensor",), ("fsdp", "tensor"), ("data", "fsdp")]


@pytest.mark.parametrize("names", MESHES, ids="-".join)
def test_each_device_holds_its_part_and_the_files_come_out_as_they_went_in(names, tmp_path):
    folder = write_folder(tmp_path / "model", CONFIG)
    alone = load_folder(folder)
    mesh = mesh_on(*names)
    spread = load_model(str(folder), mesh=mesh)
    shardings = param_shardings(spread.model, mesh)
    parts = zip(*map(jax.tree.leaves, (spread.params, alone.params, shardings)), strict=True)
    for leaf, whole, sharding in parts:
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf, whole)
        part = sharding.shard_shape(whole.shape)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {part}
    for name, loaded in (("one", alone), ("other", spread)):
        save_folder(tmp_path / name, loaded.model, loaded.params, loaded.tokenizer)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert written[0] == written[1]


def test_the_host_holds_no_more_than_a_part_at_a_time(tmp_path, monkeypatch):
    # As on an accelerator, where a part of a layer goes to its device as soon as it is read.
    from montessori_jax.models import weights

    sizes = []
    real = jax.device_put

    def watched(value, *args, **options):
        if isinstance(value, np.ndarray):
            sizes.append(value.nbytes)
        return real(value, *args, **options)

    monkeypatch.setattr(weights, "_HostBuffer", weights._DeviceBuffer)
    monkeypatch.setattr(weights.jax, "device_put", watched)
    folder = write_folder(tmp_path / "model", CONFIG)
    spread = load_folder(folder, mesh=mesh_on("fsdp", "tensor"))
    monkeypatch.undo()
    largest = max(
        shard.data.nbytes // (len(shard.data) if path[0].key == "layers" else 1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(spread.params)
        for shard in leaf.addressable_shards
    )
    assert max(sizes) == largest
