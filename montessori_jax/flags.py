"""Command-line flags made from config dataclasses, one a field."""

import argparse
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter

from montessori_jax.config_file import build

Kind = type[Any]


def _describe(kind: Kind) -> dict[str, dict[str, Any]]:
    """The JSON schema of each field: description, default, choices."""
    schema = TypeAdapter(kind).json_schema()
    return schema["properties"]


def _choices(annotation: Any) -> list[str] | None:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return None


def add_settings(
    parser: argparse.ArgumentParser,
    kind: Kind,
    title: str,
    *,
    prefix: str = "",
    skip: tuple[str, ...] = (),
) -> None:
    """Add ``--name VALUE`` for every field of ``kind``; unset ones keep the config's value."""
    group = parser.add_argument_group(title)
    described = _describe(kind)
    for item in fields(kind):
        if item.name in skip:
            continue
        about = described[item.name]
        default = about.get("default")
        several = "tuple" in str(item.type)
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        note = "" if shown is None else f" (default {shown})"
        choices = _choices(item.type)
        group.add_argument(
            f"--{prefix}{item.name.replace('_', '-')}",
            dest=f"{prefix.replace('-', '_')}{item.name}",
            default=argparse.SUPPRESS,
            choices=choices,
            nargs="+" if several else None,
            metavar=None if choices else item.name.upper(),
            help=(about.get("description", "") + note).replace("%", "%%"),
        )


def settings_from(
    arguments: argparse.Namespace,
    kind: Kind,
    base: dict[str, Any],
    *,
    prefix: str = "",
    skip: tuple[str, ...] = (),
) -> Any:
    """``kind`` filled from ``base`` (a YAML section), then from the flags that were given."""
    values = dict(base)
    for item in fields(kind):
        name = f"{prefix.replace('-', '_')}{item.name}"
        if item.name not in skip and hasattr(arguments, name):
            values[item.name] = getattr(arguments, name)
    return build(kind, values, "command line")
