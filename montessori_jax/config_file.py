"""Config files: YAML and ``section.key=value`` overrides -> checked config dataclasses.

An unknown key, a wrong type or an impossible value is a one-line `UserError` that names the key,
the file and what was expected. A file may begin from another one: ``base: other.yaml``.
"""

import copy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from montessori_jax.config import RunConfig
from montessori_jax.errors import UserError

T = TypeVar("T")


def build(kind: type[T], values: dict[str, Any], origin: str) -> T:
    """Check ``values`` against a config dataclass; ``origin`` names the file in errors."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        extra = len(error.errors()) - 1
        more = f" (and {extra} more)" if extra else ""
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = ", ".join(_names_at(kind, first["loc"][:-1]))
            raise UserError(f"{origin}: unknown key '{key}'; known here: {known}{more}") from None
        if first["type"] == "value_error":
            raise UserError(f"{origin}: '{key}': {first['ctx']['error']}{more}") from None
        raise UserError(
            f"{origin}: '{key}' is {first.get('input')!r}, but: {first['msg']}{more}"
        ) from None


def _names_at(kind: Any, path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        kind = get_type_hints(kind).get(str(part), kind)
    return [item.name for item in fields(kind)] if is_dataclass(kind) else []


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; one-line errors for a missing file, bad syntax or another top level."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML mapping on top of its ``base``, if it names one: another file, from its own folder.

    Sections are joined key by key; any other value of the file replaces its base's. A base may have
    a base.

    Raises:
        UserError: a file of the chain cannot be read, or the chain comes back to itself.
    """
    return _with_base(Path(path), ())


def _with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise UserError(f"{path}: 'base' comes back to this file: take it out of one of them")
    try:
        values = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error} (the base of {above[-1]})" if above else str(error)) from None
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: 'base' is {base!r}, but: a file's name was expected")
    return _joined(_with_base(path.parent / base, (*above, path.resolve())), values)


def _joined(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for key, value in values.items():
        known = base.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            value = _joined(known, value)
        joined[key] = value
    return joined


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply ``section.key=value`` assignments (values are YAML) to a copy of ``values``."""
    result = copy.deepcopy(values)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"override '{assignment}': expected section.key=value")
        *sections, last = name.strip().split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"override '{assignment}': '{section}' is not a section")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"override '{assignment}': the value is not valid YAML") from None
    return result


def load_run_config(path: str | Path, assignments: list[str] | None = None) -> RunConfig:
    """A `RunConfig` from a YAML file and ``section.key=value`` overrides."""
    return build(RunConfig, override(read_config(path), assignments or []), str(path))
