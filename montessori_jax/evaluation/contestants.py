"""Who is compared: a file of answers, a model, or a student of a run, by one short name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from montessori_jax.config_file import read_yaml
from montessori_jax.errors import UserError

FILES = (".jsonl", ".json", ".parquet")
UNTRAINED = "untrained"
EXPECTED = "a file of answers (.jsonl, .json, .parquet), a model, or RUN[:iteration[:student]]"


@dataclass(frozen=True)
class Contestant:
    """One side of a comparison: ``answers`` is a file, or "" where ``model`` has to answer."""

    name: str
    answers: str = ""
    model: str = ""


def find_contestant(text: str) -> Contestant:
    """Read ``[NAME=]FILE``, ``[NAME=]MODEL`` or ``[NAME=]RUN[:iteration[:student]]``.

    A run's student is ``tuned`` (trained on the tuned teacher's data; the default), ``untuned``
    (Self-Instruct), another that its method trains, or ``untrained``; the iteration is by default
    the last that trained it. Without NAME what follows it is the name. A NAME holds no slash, so
    that folders may hold "=".

    Raises:
        UserError: a run has no such student, or a file does not exist.
    """
    name, named, source = text.partition("=")
    if not named or "/" in name:
        name, source = text, text
    if source.endswith(FILES):
        if not Path(source).is_file():
            raise UserError(f"{source} does not exist; expected {EXPECTED}")
        return Contestant(name, answers=source)
    place, *rest_of_run = source.split(":")
    if (Path(place) / "config.yaml").is_file() and not (Path(place) / "config.json").is_file():
        return Contestant(name, model=_student_of(Path(place), rest_of_run))
    return Contestant(name, model=source)


def distinct(texts: Sequence[str]) -> list[Contestant]:
    """Several, whose names must differ."""
    found = [find_contestant(text) for text in texts]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of them are called {name}: write NAME=... for one")
    return found


def _student_of(run: Path, about: list[str]) -> str:
    iteration, student = [*about, "", ""][:2]
    student = student or "tuned"
    if len(about) > 2 or not student.isidentifier() or (iteration and not iteration.isdigit()):
        raise UserError(f"{':'.join([str(run), *about])}: expected RUN[:iteration[:student]]")
    if student == UNTRAINED:
        return str(read_yaml(run / "config.yaml")["student"])
    trained = {
        int(found[1]): place
        for place in run.glob(f"iteration-*/train-{student}/student")
        if (found := re.fullmatch(r"iteration-(\d+)", place.parts[-3]))
        and (place.parent / "done.json").is_file()
    }
    number = int(iteration) if iteration else max(trained, default=0)
    if number not in trained:
        has = ", ".join(map(str, sorted(trained))) or "none yet"
        raise UserError(f"{run}: iteration {number} has no trained student {student} (has: {has})")
    return str(trained[number])
