"""Hugging Face model folders: read lazily, written atomically and with the same bytes each time."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.decoder import Model, Params
from montessori_jax.models.families import TOKEN_IDS, family_of, to_hf_config
from montessori_jax.models.loaded import LoadedModel, fingerprint
from montessori_jax.models.shards import Shards, write_shard
from montessori_jax.models.tokenizer import load_tokenizer, save_tokenizer
from montessori_jax.models.weights import stored_shapes, stored_views, to_params

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files beside the weights that decide what a model does with a text.
SMALL_FILES = (CONFIG, GENERATION, "tokenizer*", "special_tokens_map.json", "added_tokens.json",
               "vocab.json", "merges.txt", "chat_template*")  # fmt: skip
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Small enough to be copied about; memory does not depend on it, for tensors are streamed.
SHARD_BYTES = 2 * 1024**3


def load_folder(
    path: str | Path,
    *,
    name: str | None = None,
    dtype: jnp.dtype | type = jnp.float32,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Read a Hugging Face folder: safetensors (one file or shards), config and tokenizer.

    Files are mapped and read once, tensor by tensor, straight into the parameters: on a CPU the
    peak is the parameters and one tensor, on an accelerator the host holds one tensor.

    Args:
        path: the folder.
        name: what the model is called afterwards; by default the path.
        dtype: of the parameters in memory.
        mesh: see `to_params`.

    Raises:
        UserError: anything missing, broken or unsupported, in one line that names it.
    """
    folder = Path(path)
    head = read_head(folder)
    params = to_params(
        head.config, Shards(_weight_files(folder)), dtype=dtype, origin=str(folder), mesh=mesh
    )
    return LoadedModel(
        name=name or str(folder),
        model=Model(head.config),
        params=params,
        tokenizer=head.tokenizer,
        generation=head.generation,
        fingerprint=fingerprint(model_files(folder)),
    )


@dataclass(frozen=True)
class Head:
    """What a folder says of a model beside its weights; see `LoadedModel`."""

    config: ModelConfig
    tokenizer: Any
    generation: dict[str, Any]


def read_head(folder: Path) -> Head:
    """Configuration, tokenizer and generation settings of a folder whose weights are there.

    Raises:
        UserError: see `load_folder`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    config_json = _read_json(folder / CONFIG, "is this a Hugging Face model folder?")
    config = family_of(config_json, str(folder / CONFIG))
    _weight_files(folder)
    generation = {key: config_json[key] for key in TOKEN_IDS if config_json.get(key) is not None}
    if (folder / GENERATION).is_file():
        generation |= _read_json(folder / GENERATION, "")
    return Head(config, load_tokenizer(folder), generation)


def model_files(folder: Path) -> list[Path]:
    """The files that a folder's model is made of: weights, configuration, tokenizer.

    Raises `UserError` where there are no weights.
    """
    small = {file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}
    return [*_weight_files(folder), *sorted(small)]


def save_folder(
    path: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any,
    generation: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Write a folder that transformers, vLLM and `load_folder` read.

    Written beside ``path`` and moved into place when complete, so that ``path`` is always whole;
    an earlier model folder there is replaced. Equal inputs give equal bytes.

    Args:
        path: the folder to make; its parents are made too.
        model: gives the configuration.
        params: its parameters; cast to ``dtype`` as they are written.
        tokenizer: as `load_folder` returns it; its files are written too. None writes none.
        generation: for ``generation_config.json``; its token ids go into ``config.json`` too.
        dtype: ``float32`` or ``bfloat16`` (rounded to nearest even).
        max_shard_bytes: a larger model is split into shards with an index.
        card: text of ``README.md``.

    Raises:
        UserError: the place cannot be written, is full, or holds something that is no model.
    """
    target = Path(path)
    if target.exists() and not _replaceable(target):
        raise UserError(f"{target}: exists and is no model folder; choose another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            config = to_hf_config(model.config, dtype=dtype, token_ids=generation)
            _write_json(partial / CONFIG, config)
            _write_json(partial / GENERATION, dict(generation or {}))
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
            _write_shards(partial, model, params, DTYPES[dtype], max_shard_bytes)
            _share(partial)
            _move_into_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        # The Rust writers of tensors and tokenizers report a full disk as exceptions of their own.
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{target}: cannot be written: {reason}; nothing was left there") from None


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _write_json(file: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        places = _read_json(folder / INDEX, "").get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{folder / INDEX}: has no 'weight_map'")
        files = [folder / name for name in sorted(set(places.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: the index names this shard, but it is missing")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if next(folder.glob("pytorch_model*.bin"), None):
        hint = "it has pytorch_model.bin only; convert it to safetensors first"
    elif found := next(folder.glob("*.gguf"), None):
        hint = f"name the GGUF file itself: {found}"
    elif (folder / "adapter_config.json").is_file():
        hint = "it holds an adapter; merge it into its base model first"
    else:
        hint = "are the weights elsewhere, or still downloading?"
    raise UserError(f"{folder}: has no {SINGLE} (nor {INDEX}); {hint}")


def _write_shards(
    folder: Path, model: Model, params: Params, dtype: np.dtype, max_bytes: int
) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room, total = max_bytes, 0
    for name, shape in stored_shapes(model.config).items():
        needed = math.prod(shape) * dtype.itemsize
        if shards[-1] and needed > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = shape
        room -= needed
        total += needed
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [SINGLE]
    tensors = stored_views(model.config, params)
    for file, shapes in zip(files, shards, strict=True):
        write_shard(folder / file, shapes, tensors, dtype)
    if count > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _share(partial: Path) -> None:
    """Usual permissions: temporary folders and some writers' files are private to their owner."""
    mode = (partial / CONFIG).stat().st_mode & 0o777
    for file in partial.iterdir():
        file.chmod(mode)
    partial.chmod(mode | (mode & 0o444) >> 2)


def _replaceable(target: Path) -> bool:
    return target.is_dir() and ((target / CONFIG).is_file() or not any(target.iterdir()))


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename; an earlier folder is moved aside first, for a full one cannot be replaced."""
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        target.rename(aside / "old")
        partial.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        partial.rename(target)
