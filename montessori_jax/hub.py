"""Pushing a run's data sets and models to the Hugging Face hub as its stages end."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from montessori_jax.errors import UserError
from montessori_jax.runs import write_json

CARD, CONFIG = "README.md", "config.json"
PUSHED = "pushed.json"


@dataclass(frozen=True)
class Artifact:
    """A folder with a card: a data set (Parquet files) or a model (a ``config.json``)."""

    folder: Path
    kind: str

    def patterns(self) -> list[str] | None:
        """Which of the folder's files are pushed; a stage keeps journals beside its data set."""
        return [CARD, "*.parquet"] if self.kind == "dataset" else None


def artifacts(stage: Path) -> Iterator[Artifact]:
    """What a finished stage made: in its own folder, or one level below."""
    for folder in (stage, *sorted(place for place in stage.iterdir() if place.is_dir())):
        if not (folder / CARD).is_file():
            continue
        if (folder / CONFIG).is_file():
            yield Artifact(folder, "model")
        elif next(folder.glob("*.parquet"), None):
            yield Artifact(folder, "dataset")


def check_hub(prefix: str) -> None:
    """Fail before any work is done where nothing could be pushed.

    Raises:
        UserError: ``prefix`` is no ``org/name``, or no one is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not prefix:
        return
    try:
        validate_repo_id(f"{prefix}-x")
    except HFValidationError:
        prefix = ""
    if prefix.count("/") != 1:
        raise UserError("push_to_hub: expected org/prefix, of letters, digits, '-', '_' and '.'")
    if get_token() is None:
        raise UserError("push_to_hub needs an account: run 'hf auth login', or set HF_TOKEN")


def push_stage(
    stage: Path, name: str, prefix: str, *, private: bool, say: Callable[[str], None]
) -> None:
    """Push what a finished stage made, each artifact once; a failure is said and tried next time.

    Args:
        stage: the stage's folder.
        name: the stage's name; repositories are called ``prefix-name`` (and ``-folder``).
        prefix: ``org/prefix``.
        private: whether repositories that are made here are private.
        say: told in one line what was pushed where, or what failed.
    """
    marker = stage / PUSHED
    pushed = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
    for artifact in artifacts(stage):
        parts = [prefix, *name.split("/")]
        if artifact.folder != stage:
            parts.append(artifact.folder.name)
        repository = "-".join(parts)
        if repository in pushed:
            continue
        try:
            pushed[repository] = _push(artifact, repository, private)
        except Exception as error:  # the hub's client raises its own, httpx's and the system's
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(
                f"warning: {artifact.folder} could not be pushed to {repository} ({reason}); it is "
                "kept here, and the next 'montessori run' tries again"
            )
            continue
        write_json(marker, pushed)
        say(f"{name}: pushed to {pushed[repository]}")


def _push(artifact: Artifact, repository: str, private: bool) -> str:
    """Upload and return the repository's address; what is there already is not sent again."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(library_name="montessori_jax")
    address = api.create_repo(
        repository, repo_type=artifact.kind, private=private, exist_ok=True
    )  # fmt: skip
    api.upload_folder(
        repo_id=repository,
        repo_type=artifact.kind,
        folder_path=artifact.folder,
        allow_patterns=artifact.patterns(),
        commit_message="Made by montessori_jax",
    )
    return str(address)
