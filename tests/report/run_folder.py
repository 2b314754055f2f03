"""Run folders as the loop leaves them, written without training: for the report's tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from montessori_jax.config import RunConfig
from montessori_jax.config_file import build
from montessori_jax.data.writing import write_jsonl, write_parquet
from montessori_jax.runs import RunDirectory, StageFolder

TASKS = ("Write a story about a dog.", "Name three rivers.", "Describe a sunset.", "Why is it?")
LOSSES = {"untrained": 2.5, "untuned": 2.4, "tuned": 2.3}


def write_run(
    folder: Path,
    *,
    texts: Sequence[str] = TASKS,
    prompts: int = 6,
    each: int = 4,
    response: str = "An answer.",
    until: str = "",
    **settings: Any,
) -> Path:
    """One iteration of ``prompts`` prompts with ``each`` candidates, whose instructions are
    ``texts`` in turn. Sample ``i`` (from 0) has influence ``(i - 3) * 1e-4``. Stages from ``until``
    on are missing."""
    config = build(RunConfig, {"run_dir": str(folder), "iterations": 1, **settings}, "test")
    directory = RunDirectory.create(config, {"seeds": "abc"}, folder)
    rows = [
        {
            "id": f"p{number:05d}-{place}",
            "prompt_id": f"p{number:05d}",
            "instruction": texts[(number * each + place) % len(texts)],
            "response": response,
            "response_finish": "end",
            "raw": "",
        }
        for number in range(prompts)
        for place in range(each)
    ]
    for name, body in _stages(rows, prompts):
        if name == until:
            directory.stage(f"iteration-1/{name}")
            break
        stage = directory.stage(f"iteration-1/{name}")
        stage.finish(body(stage))
        _add_cost(folder, name)
    return folder


def _stages(rows: list[dict[str, Any]], prompts: int) -> list[tuple[str, Any]]:
    def generate(stage: StageFolder) -> dict[str, Any]:
        write_parquet(stage.path / "data.parquet", rows)
        asked = [
            {"prompt_id": f"p{n:05d}", "prompt": [{"role": "user", "content": f"Ask {n}."}]}
            for n in range(prompts)
        ]
        write_jsonl(stage.path / "prompts.jsonl", asked)
        kept = {"kept": len(rows), "candidates": len(rows) + 2, "rows": len(rows)}
        return {"yield": 0.9, "dropped": {"keyword": 2}, **kept}

    def split(stage: StageFolder) -> dict[str, Any]:
        write_parquet(stage.path / "probing.parquet", rows)
        return {"warmup": 0, "probing": len(rows)}

    def influence(stage: StageFolder) -> dict[str, Any]:
        scores = [
            {"index": i, "id": row["id"], "influence": (i - 3) * 1e-4, "offset": -1e-4}
            for i, row in enumerate(rows)
        ]
        write_parquet(stage.path / "scores.parquet", scores)
        scored = {"scored": len(rows), "null": 0, "reasons": {}, "positive_share": 0.8}
        made = {"method": "first_order", "references": 4, "offset": None}
        return {**scored, **made, "audits": [AUDIT], "audit": AUDIT}

    def evaluate(name: str) -> Any:
        def body(stage: StageFolder) -> dict[str, Any]:
            draw = np.random.default_rng(0).normal(size=8)
            losses = (LOSSES[name] + 0.2 * draw).tolist()
            loss = {"loss": LOSSES[name], "standard_error": 0.05, "samples": 8, "tokens": 90}
            return {"student": "s", "skipped": {}, "reference_loss": loss | {"by_sample": losses}}

        return body

    def train(stage: StageFolder) -> dict[str, Any]:
        return {"rows": len(rows), "tokens": 900}

    return [
        ("generate", generate), ("split", split), ("influence", influence),
        ("preferences", lambda stage: PAIRS), ("dpo", lambda stage: DPO),
        ("synthesise-untuned", generate), ("synthesise-tuned", generate),
        ("train-untuned", train), ("train-tuned", train),
        *((f"evaluate-{name}", evaluate(name)) for name in LOSSES),
    ]  # fmt: skip


PAIRS = {
    "rule": "sign", "prompts": 6, "prompts_without": 1, "without": {"all on one side": 1},
    "pairs": 5, "training": 4, "heldout": 1,
}  # fmt: skip
DPO = {
    "pairs": 4, "first_loss": 0.69, "last_loss": 0.5, "kl": 0.01,
    "heldout_before": {"reward_margin": 0.0, "reward_accuracy": 0.0},
    "heldout_after": {"reward_margin": 0.2, "reward_accuracy": 1.0},
}  # fmt: skip
AUDIT = {
    "method": "first_order",
    "agreement": {
        "count": 3,
        "spearman": 0.5,
        "pairs": {"jaccard": None},
        "error": {"total": 0.25},
    },
    "intervals": {"spearman": [0.25, 0.75], "error": [0.125, 0.375], "pairs": None},
    "failures": ["Spearman 0.500 is below 0.95"],
    "scores": [{"id": str(n), "estimate": n * 1e-4, "truth": n * 1.1e-4} for n in range(3)],
}


def _add_cost(folder: Path, stage: str) -> None:
    row = {
        "stage": f"iteration-1/{stage}", "finished": True, "seconds": 2.0, "generated_tokens": 48,
        "peak_memory_bytes": 2**30, "device": "cpu",
    }  # fmt: skip
    with open(folder / "costs.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
