"""What every section of the settings is made of: strict dataclasses with described fields."""

from typing import Any

from pydantic import ConfigDict, Field, TypeAdapter

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def setting(default: Any, description: str, **bounds: Any) -> Any:
    """A field with its default, its line of help and its bounds (``ge``, ``gt``, ``le``, ...)."""
    return Field(default=default, description=description, **bounds)


def as_dict(settings: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON-able values."""
    return TypeAdapter(type(settings)).dump_python(settings, mode="json")
