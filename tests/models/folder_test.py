"""Folders in and out: shards, dtypes, equal bytes, atomic replacement, and one error a fault."""

import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.models import folder as folder_module
from montessori_jax.models.families import family_of
from montessori_jax.models.folder import load_folder, save_folder
from montessori_jax.models.loaded import LoadedModel
from tests.models.tiny import (
    CONFIG,
    jax_logits,
    relative_error,
    tokenizer,
    tokens_for,
    torch_logits,
    torch_model,
    write_folder,
)

GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    return write_folder(tmp_path_factory.mktemp("models") / "source", CONFIG)


@pytest.fixture(scope="module")
def loaded(source: Path) -> LoadedModel:
    return load_folder(source)


def save(path: Path, model: LoadedModel, **options: object) -> Path:
    save_folder(path, model.model, model.params, model.tokenizer, model.generation, **options)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def same(one: LoadedModel, two: LoadedModel) -> bool:
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True)
    return one.model == two.model and all(jnp.array_equal(a, b) for a, b in leaves)


class TestReading:
    def test_a_folder_by_transformers(self, source: Path, loaded: LoadedModel):
        tokens = tokens_for(CONFIG)
        found = jax_logits(loaded.model, loaded.params, tokens)
        assert relative_error(found, torch_logits(torch_model(CONFIG), tokens)) < 1e-5
        assert loaded.name == str(source)
        assert loaded.generation["eos_token_id"] == 2
        assert loaded.tokenizer.encode("w7 w8") == [7, 8]

    def test_shards_by_transformers(self, source: Path, loaded: LoadedModel, tmp_path: Path):
        sharded = write_folder(tmp_path / "sharded", CONFIG, max_shard_size="20KB")
        assert len(list(sharded.glob("model-*.safetensors"))) > 2
        assert not (sharded / "model.safetensors").exists()
        assert same(load_folder(sharded), loaded)

    def test_bfloat16_by_transformers(self, tmp_path: Path):
        narrow = torch_model(CONFIG).bfloat16()
        narrow.save_pretrained(tmp_path / "narrow")
        tokenizer().save_pretrained(tmp_path / "narrow")
        model = load_folder(tmp_path / "narrow")
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
        norm = narrow.model.norm.weight.detach().float().numpy()
        assert np.array_equal(model.params["norm"]["scale"], norm)

    def test_another_dtype_and_name(self, source: Path):
        model = load_folder(source, name="hf:some/model", dtype=jnp.bfloat16)
        assert model.name == "hf:some/model"
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}

    def test_generation_defaults_come_from_either_file(self, source: Path, tmp_path: Path):
        copy = copied(source, tmp_path)
        (copy / "generation_config.json").unlink()
        assert load_folder(copy).generation == {"bos_token_id": 1, "eos_token_id": 2}
        (copy / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
        assert load_folder(copy).generation == {"bos_token_id": 1, "eos_token_id": [2, 9]}


class TestWriting:
    def test_transformers_loads_it(self, loaded: LoadedModel, tmp_path: Path):
        model = replace(loaded, generation=GENERATION)
        out = save(tmp_path / "deep" / "out", model, card="# Hello")
        theirs = AutoModelForCausalLM.from_pretrained(out)
        tokens = tokens_for(CONFIG)
        expected = torch_logits(torch_model(CONFIG), tokens)
        assert np.array_equal(torch_logits(theirs.eval(), tokens), expected)
        assert theirs.generation_config.eos_token_id == [2, 5]
        assert theirs.generation_config.temperature == 0.6
        assert theirs.config.eos_token_id == [2, 5]
        assert AutoTokenizer.from_pretrained(out).encode("w7 w8") == [7, 8]
        assert (out / "README.md").read_text() == "# Hello"

    def test_it_comes_back_bit_for_bit(self, loaded: LoadedModel, tmp_path: Path):
        again = load_folder(save(tmp_path / "out", loaded))
        assert same(again, loaded)
        assert again.generation == loaded.generation

    @pytest.mark.parametrize("tied", [False, True])
    def test_shards_are_what_was_asked_for(self, tied: bool, tmp_path: Path):
        model = Model(family_of(CONFIG | {"tie_word_embeddings": tied}, "x"))
        params = model.init(jax.random.key(0))
        out, limit = tmp_path / "out", 20_000
        save_folder(out, model, params, tokenizer(), max_shard_bytes=limit)
        shards = sorted(out.glob("*.safetensors"))
        assert [file.name for file in shards] == [
            f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
        ]
        sizes = [sum(a.nbytes for a in load_file(file).values()) for file in shards]
        assert all(size <= limit for size in sizes)
        assert all(a + b > limit / 2 for a, b in pairwise(sizes))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes) == 4 * model.parameter_count()
        assert index["weight_map"] == {name: f.name for f in shards for name in load_file(f)}
        tokens = tokens_for(CONFIG)
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()
        found = jax_logits(model, load_folder(out).params, tokens)
        assert relative_error(found, torch_logits(theirs, tokens)) < 1e-5

    def test_a_tensor_larger_than_a_shard_gets_its_own(self, loaded: LoadedModel, tmp_path: Path):
        out = save(tmp_path / "out", loaded, max_shard_bytes=1)
        assert len(list(out.glob("*.safetensors"))) == 30
        assert same(load_folder(out), loaded)

    def test_bfloat16_is_rounded_to_nearest_and_then_stays(self, loaded, tmp_path: Path):
        out = save(tmp_path / "out", loaded, dtype="bfloat16")
        stored = load_file(out / "model.safetensors")
        assert {array.dtype.name for array in stored.values()} == {"bfloat16"}
        scale = np.asarray(loaded.params["norm"]["scale"])
        assert np.array_equal(stored["model.norm.weight"], scale.astype(ml_dtypes.bfloat16))
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
        again = save(tmp_path / "again", load_folder(out), dtype="bfloat16")
        assert contents(again) == contents(out)

    def test_equal_inputs_give_equal_bytes(self, loaded: LoadedModel, tmp_path: Path):
        one = save(tmp_path / "one", loaded, card="x", max_shard_bytes=20_000)
        two = save(tmp_path / "elsewhere" / "two", loaded, card="x", max_shard_bytes=20_000)
        assert contents(one) == contents(two)
        assert load_folder(one).fingerprint == load_folder(two).fingerprint
        third = save(tmp_path / "three", load_folder(two), card="x", max_shard_bytes=20_000)
        assert contents(third) == contents(one)

    def test_files_have_the_usual_permissions(self, loaded: LoadedModel, tmp_path: Path):
        out = save(tmp_path / "out", loaded)
        plain = tmp_path / "plain"
        plain.write_text("")
        modes = {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
        assert modes == {stat.S_IMODE(plain.stat().st_mode)}
        (tmp_path / "made").mkdir()
        assert out.stat().st_mode == (tmp_path / "made").stat().st_mode

    def test_an_earlier_model_is_replaced_as_a_whole(self, loaded: LoadedModel, tmp_path: Path):
        out = save(tmp_path / "out", loaded, max_shard_bytes=20_000)
        save(out, loaded)
        assert contents(out) == contents(save(tmp_path / "fresh", loaded))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]

    def test_what_a_killed_writer_left_is_cleared_away(self, loaded: LoadedModel, tmp_path: Path):
        (tmp_path / ".out.partial-abc").mkdir()
        (tmp_path / ".out.partial-abc" / "model.safetensors").write_text("half")
        save(tmp_path / "out", loaded)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_empty_folder_may_be_filled(self, loaded: LoadedModel, tmp_path: Path):
        (tmp_path / "out").mkdir()
        save(tmp_path / "out", loaded)
        assert same(load_folder(tmp_path / "out"), loaded)

    def test_no_other_folder_is_ever_replaced(self, loaded: LoadedModel, tmp_path: Path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match="exists and is no model folder"):
            save(tmp_path / "out", loaded)
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="exists and is no model folder"):
            save(tmp_path / "file", loaded)
        assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let no file grow past ``limit`` bytes: the system's own refusal, as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFullDisk:
    @pytest.mark.parametrize("limit", [100, 2_000, 20_000])  # in config, tokenizer, weights
    def test_one_line_and_no_half_folder(self, loaded: LoadedModel, tmp_path: Path, limit: int):
        with small_files(limit), pytest.raises(UserError) as caught:
            save(tmp_path / "out", loaded)
        assert "cannot be written" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_the_earlier_model_stays(self, loaded: LoadedModel, tmp_path: Path):
        out = save(tmp_path / "out", loaded)
        before = contents(out)
        with small_files(20_000), pytest.raises(UserError, match="cannot be written"):
            save(out, loaded)
        assert contents(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_ctrl_c_leaves_nothing(self, loaded: LoadedModel, tmp_path: Path, monkeypatch):
        def interrupted(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(folder_module, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "out", loaded)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_place_that_may_not_be_written(self, loaded: LoadedModel, tmp_path: Path):
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="Permission denied"):
            save(tmp_path / "out", loaded)

    def test_a_parent_that_is_a_file(self, loaded: LoadedModel, tmp_path: Path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="cannot be written"):
            save(tmp_path / "file" / "out", loaded)


def copied(source: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


class TestFingerprint:
    def test_the_same_wherever_the_folder_lies(self, source, loaded: LoadedModel, tmp_path: Path):
        assert load_folder(copied(source, tmp_path), name="x").fingerprint == loaded.fingerprint

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
    )
    def test_another_with_any_changed_byte(self, source, loaded, tmp_path: Path, name: str):
        copy = copied(source, tmp_path)
        content = bytearray((copy / name).read_bytes())
        if name == "model.safetensors":
            content[-1] ^= 1  # the lowest bit of the last tensor's exponent
        else:
            content += b" "
        (copy / name).write_bytes(content)
        assert load_folder(copy).fingerprint != loaded.fingerprint

    def test_not_by_the_card(self, source, loaded: LoadedModel, tmp_path: Path):
        copy = copied(source, tmp_path)
        (copy / "README.md").write_text("# Other words")
        assert load_folder(copy).fingerprint == loaded.fingerprint


class TestErrors:
    def refused(self, path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_folder(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_no_folder(self, tmp_path: Path):
        assert self.refused(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"

    def test_wrong_folder(self, tmp_path: Path):
        message = self.refused(tmp_path)
        assert "config.json: no such file; is this a Hugging Face model folder?" in message

    @pytest.mark.parametrize("text", ["{", "[1]", "\x00\xff"])
    def test_broken_config(self, source: Path, tmp_path: Path, text: str):
        copy = copied(source, tmp_path)
        (copy / "config.json").write_text(text, encoding="latin-1")
        assert str(copy / "config.json") in self.refused(copy)

    def test_unsupported_architecture(self, source: Path, tmp_path: Path):
        copy = copied(source, tmp_path)
        (copy / "config.json").write_text('{"model_type": "bert"}')
        assert "model_type 'bert' is not supported; supported: llama" in self.refused(copy)

    def test_no_weights(self, source: Path, tmp_path: Path):
        copy = copied(source, tmp_path)
        (copy / "model.safetensors").unlink()
        assert "has no model.safetensors" in self.refused(copy)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("pytorch_model.bin", "convert it to safetensors first"),
            ("pytorch_model-00001-of-00002.bin", "convert it to safetensors first"),
            ("some.Q4_K_M.gguf", "name the GGUF file itself"),
            ("adapter_config.json", "merge it into its base model first"),
        ],
    )
    def test_other_kinds_of_weights(self, source: Path, tmp_path: Path, name: str, hint: str):
        copy = copied(source, tmp_path)
        (copy / "model.safetensors").rename(copy / name)
        assert hint in self.refused(copy)

    def test_missing_shard(self, tmp_path: Path):
        sharded = write_folder(tmp_path / "s", CONFIG, max_shard_size="20KB")
        second = sorted(sharded.glob("model-*.safetensors"))[1]
        second.unlink()
        assert self.refused(sharded) == f"{second}: the index names this shard, but it is missing"

    def test_broken_index(self, source: Path, tmp_path: Path):
        copy = copied(source, tmp_path)
        (copy / "model.safetensors.index.json").write_text('{"metadata": {}}')
        assert "has no 'weight_map'" in self.refused(copy)
        (copy / "model.safetensors.index.json").write_text("{")
        assert "model.safetensors.index.json: cannot be read" in self.refused(copy)

    @pytest.mark.parametrize("keep", [0, 5, 500, -7])
    def test_a_file_cut_short(self, source: Path, tmp_path: Path, keep: int):
        copy = copied(source, tmp_path)
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[:keep])
        message = self.refused(copy)
        assert "model.safetensors: cannot be read as safetensors" in message
        assert "copy or download it again" in message

    def test_missing_tokenizer(self, source: Path, tmp_path: Path):
        copy = copied(source, tmp_path)
        (copy / "tokenizer.json").unlink()
        assert "no tokenizer in" in self.refused(copy)

    def test_missing_tensor(self, source: Path, tmp_path: Path):
        copy = copied(source, tmp_path)
        tensors = load_file(copy / "model.safetensors")
        del tensors["model.layers.2.mlp.gate_proj.weight"]
        save_file(tensors, copy / "model.safetensors")
        message = self.refused(copy)
        assert message == f"{copy}: missing tensors: model.layers.2.mlp.gate_proj.weight"
