"""Runs of the methods on a tiny teacher, and what they reported."""

import json
from pathlib import Path
from typing import Any

from montessori_jax.config import RunConfig
from montessori_jax.config_file import build
from montessori_jax.pipeline import run
from montessori_jax.stopping import Stop
from tests.end_to_end.resume_test import CONFIG

SMALL: dict[str, Any] = {
    "compare_self_instruct": False,
    "synthesis_prompts": 3,
    "competing_responses": 3,
    "judging": {"samples": 2, "temperature": 1.0, "max_tokens": 12},
    "llm2llm": {"seed_rows": 6, "hard_share": 0.5},
    "evaluation": {"max_length": 256},
    "bootstrap": {"learning_rate": 1e-3, "batch_size": 2, "max_length": 512},
    "dpo": {**CONFIG["dpo"], "learning_rate": 1e-3},
}


def settings(teacher: Path, place: Path, **changed: Any) -> RunConfig:
    values = {**CONFIG, **SMALL, "teacher": str(teacher), "student": str(teacher),
              "run_dir": str(place), **changed}  # fmt: skip
    return build(RunConfig, values, "test")


def go(config: RunConfig, stop: Stop | None = None) -> list[str]:
    said: list[str] = []
    run(config, say=said.append, stop=stop or Stop(), quiet=True)
    return said


class StopAfter(Stop):
    """Asks for a stop as soon as a file has so many lines."""

    def __init__(self, path: Path, lines: int):
        super().__init__()
        self.path, self.lines = path, lines

    def requested(self) -> bool:
        return self.path.exists() and self.path.read_bytes().count(b"\n") >= self.lines


def stages(place: Path, iteration: int = 1) -> dict[str, dict[str, Any]]:
    """What each stage reported."""
    found = (place / f"iteration-{iteration}").glob("*/done.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}
