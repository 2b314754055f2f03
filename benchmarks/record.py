"""Results of benchmarks: one JSON file each, with all that it takes to read the numbers later."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "rapidfuzz", "rouge-score"),
    *("transformers", "tokenizers", "torch", "trl", "gguf", "safetensors", "pyarrow", "libtpu"),
    "lm-eval",
)
"""Packages whose versions can change a result; those that are absent are left out."""


def write_result(
    name: str, payload: Mapping[str, Any], *, folder: Path = RESULTS, command: str | None = None
) -> Path:
    """Writes ``payload`` and the circumstances of its making to ``folder/name.json``.

    The file holds ``date`` (UTC), ``commit`` (and whether tracked files differed from it),
    ``command``, ``machine``, ``packages`` and ``result``, which is the payload. Replaced whole, so
    that a reader never meets half a file.

    Args:
        name: file name without its ending.
        payload: the numbers, as JSON values. Name units in the keys (``seconds``, ``ms``, ``mib``).
        folder: where to write.
        command: how to run it again; by default the module and arguments of this process, without
            folders.

    Returns:
        The file's path.
    """
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command or _command(),
        "machine": machine(),
        "packages": packages(),
        "result": dict(payload),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    half = path.with_suffix(".json.part")
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    half.write_text(text, encoding="utf-8")
    half.replace(path)
    return path


def commit() -> dict[str, str | bool | None]:
    """The checkout's commit and whether tracked files were changed; None outside a checkout."""
    identity = _git("rev-parse", "HEAD")
    if identity is None:
        return {"id": None, "changed": None}
    changes = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return {"id": identity, "changed": bool(changes)}


def machine() -> dict[str, Any]:
    """Platform, CPU and memory, and the accelerators of a JAX that is already in use."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _memory_gib(),
    }
    # A benchmark of text code should not pay for a device, nor be slowed by one.
    if jax := sys.modules.get("jax"):
        facts["devices"] = [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    return facts


def packages() -> dict[str, str]:
    """Versions of the ``PACKAGES`` that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages / 2**30, 1)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _command() -> str:
    """``python -m benchmarks.NAME ARGUMENTS``; of a path only its last part is of interest."""
    arguments = [Path(a).name if os.sep in a else a for a in sys.argv[1:]]
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments])
