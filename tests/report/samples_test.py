"""Which samples a page holds, and what it says of each."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from montessori_jax.report.run_data import read_run
from montessori_jax.report.samples import LONGEST, choose_prompts, collect, read_scores
from tests.report.run_folder import write_run


def test_the_most_telling_prompts_come_first_and_some_by_chance():
    prompts = [f"p{number // 2}" for number in range(200)]  # two candidates each, 100 prompts
    influence = np.arange(200.0)
    chosen = choose_prompts(prompts, influence, 40, seed=0)
    # Best, worst, next best, ...; the tenth and twentieth are drawn.
    assert chosen[:9] == ["p99", "p0", "p98", "p1", "p97", "p2", "p96", "p3", "p95"]
    assert len(chosen) == 20
    ends = {f"p{number}" for number in (*range(11), *range(89, 100))}
    assert len(set(chosen) - ends) in (1, 2)
    assert chosen == choose_prompts(prompts, influence, 40, seed=0)


def test_all_prompts_where_they_are_few_scored_or_not():
    influence = np.array([0.1, np.nan, -0.2, np.nan])
    chosen = choose_prompts(["a", "b", "c", "d"], influence, 100, seed=0)
    assert sorted(chosen) == ["a", "b", "c", "d"]
    assert chosen[:2] == ["a", "c"]


def test_a_sample_has_its_rank_its_siblings_and_what_was_asked(tmp_path: Path):
    run = read_run(write_run(tmp_path / "run", prompts=3, each=2), "run")
    data = collect([run])
    assert data["groups"] == [{"label": "iteration 1", "total": 6, "shown": 6, "finished": True}]
    best = data["samples"][0]
    # Prompt 2 has the samples 4 and 5; 5 has the highest influence, (5 - 3) * 1e-4.
    assert data["prompts"][best[0]] == [0, "p00002", [["user", "Ask 2."]]]
    assert [sample[3] for sample in data["samples"] if sample[0] == best[0]] == [2, 1]
    assert [sample[2] for sample in data["samples"][:2]] == pytest.approx([1e-4, 2e-4])


def test_long_texts_are_cut_and_missing_scores_stay_missing(tmp_path: Path):
    folder = write_run(tmp_path / "run", until="influence", response="r" * (LONGEST + 5))
    scores = [{"id": "p00000-0", "influence": None}, {"id": "p00000-1", "influence": 1e-4}]
    journal = folder / "iteration-1/influence/chunks.jsonl"
    journal.write_text(json.dumps({"chunk": 0, "scores": scores}) + "\n")
    found = read_scores(folder / "iteration-1/influence")
    assert found is not None
    assert (found.finished, len(found.known)) == (False, 1)
    samples = collect([read_run(folder, "run")])["samples"]
    assert [(sample[1], sample[2], sample[3]) for sample in samples] == [
        ("p00000-0", None, None), ("p00000-1", 1e-4, 1)
    ]  # fmt: skip
    assert samples[0][5] == "r" * LONGEST + " …"


def test_a_run_without_influence_has_none(tmp_path: Path):
    folder = write_run(tmp_path / "run", until="influence")
    assert read_scores(folder / "iteration-1/influence") is None
    assert collect([read_run(folder, "run")])["samples"] == []


def test_responses_compete_under_their_instruction(tmp_path: Path):
    folder = write_run(tmp_path / "run", prompts=2, each=3)
    place = folder / "iteration-1"
    shutil.copytree(place / "influence", place / "influence-responses")
    shutil.copytree(place / "generate", place / "respond")
    data = collect([read_run(folder, "run")])
    assert [group["label"] for group in data["groups"]] == ["iteration 1", "iteration 1, responses"]
    assert len(data["samples"]) == 12
    assert {prompt[0] for prompt in data["prompts"]} == {0, 1}
