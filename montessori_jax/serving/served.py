"""What a server is given to serve: a Hugging Face folder, and the adapter that it is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from montessori_jax.errors import UserError
from montessori_jax.models.adapter_folder import is_adapter, read_adapter_config
from montessori_jax.models.folder import Head, read_head, save_folder
from montessori_jax.models.sources import (
    base_of,
    cache_folder,
    load_model,
    model_fingerprint,
    resolve,
)

ADAPTER = "adapter"  # beside an exported model, where it was tuned with LoRA


def servable(source: str, fingerprint: str, dtype: str, say: Callable[[str], None]) -> Path:
    """The Hugging Face folder of a model; other forms are written as one into the cache, once.

    Args:
        source: a model's name, see `montessori_jax.models.sources.load_model`.
        fingerprint: of that model.
        dtype: ``float32`` or ``bfloat16``, of what is written.
        say: told when something is.
    """
    path = resolve(source)
    if path.is_dir() and not is_adapter(path):
        return path
    folder = cache_folder() / "served" / f"{fingerprint[:16]}-{dtype}"
    if not (folder / "config.json").exists():
        say(f"writing {source} as a Hugging Face folder for vLLM: {folder}")
        loaded = load_model(source, dtype=dtype)
        save_folder(
            folder, loaded.model, loaded.params, loaded.tokenizer, loaded.generation, dtype=dtype
        )
    return folder


@dataclass(frozen=True)
class Served:
    """A model as a server is given it.

    ``source`` is its name, ``folder`` the Hugging Face folder, ``head`` what that says beside the
    weights.
    """

    source: str
    fingerprint: str
    folder: Path
    head: Head

    @classmethod
    def of(cls, source: str, dtype: str, say: Callable[[str], None]) -> "Served":
        """See `servable`."""
        fingerprint = model_fingerprint(source)
        folder = servable(source, fingerprint, dtype, say)
        return cls(source, fingerprint, folder, read_head(folder))


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, the name of the model that it is for, and its rank."""

    folder: Path
    base: str
    rank: int


def adapter_of(folder: Path) -> Adapter | None:
    """The adapter that ``folder`` was merged from, if it lies beside it."""
    beside = folder.with_name(ADAPTER)
    if not is_adapter(beside):
        return None
    try:
        return Adapter(beside, base_of(beside), int(read_adapter_config(beside)["r"]))
    except (UserError, KeyError, TypeError, ValueError):
        return None  # the merged folder serves as well
