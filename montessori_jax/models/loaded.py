"""A model with its numbers, its tokenizer and an identity that caches can be keyed by."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_jax.models.decoder import Model, Params


@dataclass(frozen=True)
class LoadedModel:
    """What a stage needs of a model.

    ``name`` is what the user called it; ``generation`` holds the keys of its
    ``generation_config.json`` (at least the token ids ``bos_token_id``, ``eos_token_id`` and
    ``pad_token_id`` where they are known); ``fingerprint`` changes whenever a weight, a setting
    or the tokenizer does, and not when the files are moved.
    """

    name: str
    model: Model
    params: Params
    tokenizer: Any
    generation: dict[str, Any]
    fingerprint: str


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the names and the whole contents of ``files``, in hexadecimal.

    Files are hashed side by side. The price is one more reading of the files (from the page
    cache, as a rule), about a second for 500 MB on one core.
    """

    def digest(path: Path) -> str:
        with open(path, "rb") as file:
            return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}"

    with ThreadPoolExecutor() as pool:
        lines = sorted(pool.map(digest, files))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
