"""A run directory -> one JSON-able summary, finished or not."""

from typing import Any

from montessori_jax.config_file import read_yaml
from montessori_jax.costs import read_ledger
from montessori_jax.report.method import described, tuning_stages
from montessori_jax.runs import RunDirectory, flatten

Summary = dict[str, Any]


def summarise(directory: RunDirectory) -> Summary:
    """What each stage of each iteration reported, and what it cost; None for stages not done."""
    config = read_yaml(directory.path / "config.yaml")
    settings = flatten(config)
    iterations = []
    for folder in sorted(directory.path.glob("iteration-*"), key=_number):
        stages = {
            place.name: directory.stage(f"{folder.name}/{place.name}").result()
            for place in sorted(folder.iterdir())
            if place.is_dir()
        }
        iterations.append({"iteration": _number(folder), "stages": stages})
    return {
        "run": directory.path.name,
        "method": config["method"],
        "described": described(settings),
        "tuning_stages": tuning_stages(settings),
        "teacher": config["teacher"],
        "student": config["student"],
        "iterations": iterations,
        "costs": read_ledger(directory.path / "costs.jsonl"),
    }


def _number(folder: Any) -> int:
    return int(folder.name.rsplit("-", 1)[-1])
