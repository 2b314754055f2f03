"""Which software made a run: recorded when it begins, and again when it goes on with another."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "montessori-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
    "tokenizers", "numpy", "pyarrow", "vllm",
)  # fmt: skip
NAME = "versions.json"
OWN = "montessori-jax"
# What must be the same on every host of a job: programs compiled by different versions do not talk,
# and all processes write and read one checkpoint together; each tokenises, draws and writes a share
# of the rows that all of them then use.
SHARED = (
    OWN, "jax", "jaxlib", "libtpu", "orbax-checkpoint", "transformers", "tokenizers", "numpy",
    "pyarrow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Python and the packages that decide results, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def shared_versions() -> dict[str, str | None]:
    """This host's versions of what the hosts of a job must have in common; None: not installed."""
    found: dict[str, str | None] = {}
    for package in SHARED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def difference(mine: Mapping[str, str | None], wanted: Mapping[str, str | None]) -> str:
    """In what ``mine`` differs from ``wanted``, and what to do here; empty where in nothing.

    Both are as `shared_versions` gives them.
    """
    # What process 0 does not speak of, it has no say in: its clone is an older one.
    different = [name for name in SHARED if name in wanted and mine.get(name) != wanted[name]]
    if not different:
        return ""
    told = ", ".join(
        f"{name} {mine.get(name) or 'missing'} here and {wanted.get(name) or 'missing'} there"
        for name in different
    )
    others = [name for name in different if name != OWN]
    pinned = [f"'{name}=={wanted[name]}'" for name in others if wanted.get(name)]
    surplus = [name for name in others if not wanted.get(name)]
    steps = [f"install the clone that process 0 has ({OWN} {wanted.get(OWN)})"] * (OWN in different)
    steps += [f"pip install {' '.join(pinned)}"] * bool(pinned)
    steps += [f"pip uninstall {' '.join(surplus)}"] * bool(surplus)
    return f"({told}): install the same on every host; on this one {', then '.join(steps)}"


def recorded_versions(run: Path) -> list[dict[str, str]]:
    """Every set of versions that worked on a run, the first one first; none from before."""
    file = run / NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
