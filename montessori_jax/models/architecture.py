"""The shape of a model by its name, without its weights."""

import json
from pathlib import Path

from montessori_jax.errors import UserError
from montessori_jax.models.adapter_folder import is_adapter
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.families import family_of
from montessori_jax.models.gguf import gguf_config
from montessori_jax.models.sources import base_of, resolve
from montessori_jax.models.tokenizer import open_gguf

# The config.json of models on the hub, some of them behind a licence, as their makers publish it.
PUBLISHED = Path(__file__).parent / "published"


def published_models() -> list[str]:
    """Names (``hf:org/name``) of the models whose shapes ship with this package."""
    return sorted(f"hf:{file.stem.replace('--', '/')}" for file in PUBLISHED.glob("*.json"))


def architecture(name: str) -> ModelConfig:
    """What `load_model` would make of ``name``, with no weight read.

    Of a folder ``config.json`` is enough; ``hf:org/name`` comes from the published shapes that
    ship here, and else from the hub.

    Raises:
        UserError: there is no such model, or it is of no supported family.
    """
    shipped = PUBLISHED / f"{name.removeprefix('hf:').replace('/', '--')}.json"
    if name.startswith("hf:") and shipped.is_file():
        return _read(shipped, name)
    path = resolve(name)
    if path.is_file():
        return gguf_config(open_gguf(path), name)
    if is_adapter(path):
        return architecture(base_of(path))
    return _read(path / "config.json", name)


def _read(file: Path, name: str) -> ModelConfig:
    try:
        return family_of(json.loads(file.read_text(encoding="utf-8")), name)
    except OSError as error:
        raise UserError(f"model '{name}': {file.name} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"model '{name}': {file.name} is not valid JSON: {error}") from None
