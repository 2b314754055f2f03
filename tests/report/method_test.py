"""How runs are called by their settings, and what their tables say of stages that they have not."""

from pathlib import Path
from typing import Any, get_args

import pytest

from montessori_jax.config import RunConfig, as_dict
from montessori_jax.config.methods import SignalName
from montessori_jax.config_file import build
from montessori_jax.report.main_table import students
from montessori_jax.report.method import SCORED_BY, described, tuning_stages
from montessori_jax.report.run_data import read_run
from montessori_jax.report.summary import summarise
from montessori_jax.report.table import render
from montessori_jax.runs import RunDirectory, flatten
from tests.report.run_folder import write_run

JUDGED: dict[str, Any] = {"rule": "extremes"}
URL = {"base_url": "http://127.0.0.1:8000/v1", "model": "gpt-4o"}


def settings(**values: Any) -> dict[str, Any]:
    return flatten(as_dict(build(RunConfig, values, "test")))


@pytest.mark.parametrize(
    ("values", "called"),
    [
        ({}, "montessori"),
        ({"method": "self_instruct"}, "self_instruct"),
        ({"method": "self_reward", "preferences": JUDGED}, "self_reward"),
        ({"signal": "judge", "preferences": JUDGED}, "montessori (signal: judge)"),
        (
            {"signal": "judge", "preferences": JUDGED, "judge": URL},
            "montessori (signal: judge, judge: gpt-4o)",
        ),
        ({"preferences": JUDGED}, "montessori (rule: extremes)"),
        ({"optimise": "response"}, "montessori (optimise: response)"),
        (
            {"signal": "random", "optimise": "bootstrap", "preferences": JUDGED},
            "montessori (signal: random, optimise: bootstrap)",
        ),
        # The judge of an evaluation is no part of the method.
        ({"method": "self_instruct", "judge": URL}, "self_instruct"),
        (
            {"method": "self_instruct", "generator": "url", "url": {"model": "gpt-4o"}},
            "self_instruct (teacher: gpt-4o)",
        ),
        ({"method": "no_finetuning", "generator": "url"}, "no_finetuning"),
        (
            {"method": "self_reward", "preferences": JUDGED, "judge": URL},
            "self_reward (judge: gpt-4o)",
        ),
    ],
)
def test_a_method_is_called_by_what_sets_it_apart(values: dict[str, Any], called: str):
    assert described(settings(**values)) == called


def test_every_signal_has_its_stage():
    assert set(SCORED_BY) == set(get_args(SignalName))


def test_older_runs_lack_settings():
    assert described({"method": "montessori"}) == "montessori"
    assert tuning_stages({"method": "montessori"})[-1] == "dpo"


def test_ablations_do_not_look_like_the_plain_method(tmp_path: Path):
    runs = [
        read_run(write_run(tmp_path / "plain"), "plain"),
        read_run(write_run(tmp_path / "answers", optimise="response"), "answers"),
    ]
    assert list(dict.fromkeys(one.method for one in students(runs))) == [
        "montessori",
        "montessori (optimise: response)",
    ]


def begun(folder: Path, **values: Any) -> str:
    """The table of a run that has not gone beyond its first stage."""
    written = write_run(folder, until="split", **values)
    return render(summarise(RunDirectory.existing(written)))


def waiting(table: str) -> list[str]:
    lines = (line for line in table.splitlines() if "not done yet" in line)
    return [line.split("|")[1].strip() for line in lines]


def test_what_is_not_done_is_of_the_runs_own_method(tmp_path: Path):
    influence = ["influence", "share of positive influence"]
    pairs = ["preference pairs", "prompts that gave no pair"]
    tuned = ["DPO loss", "KL to the teacher before, last step, nats a token"]
    assert waiting(begun(tmp_path / "plain")) == [*influence, *pairs, *tuned]
    judged = begun(tmp_path / "judged", signal="judge", preferences=JUDGED)
    assert judged.startswith("# judged: montessori (signal: judge)\n")
    assert waiting(judged) == ["judge's scores", *pairs, *tuned]
    assert waiting(begun(tmp_path / "answers", optimise="response")) == [
        "competing responses",
        *(f"{one} of responses" for one in influence),
        "preference pairs of responses",
        "instructions that gave no pair",
        *tuned,
    ]
    assert waiting(begun(tmp_path / "both", optimise="both")) == [
        "competing responses",
        *influence,
        *(f"{one} of responses" for one in influence),
        *pairs,
        "preference pairs of responses",
        "instructions that gave no pair",
        *tuned,
    ]
    assert waiting(begun(tmp_path / "bootstrap", optimise="bootstrap")) == [
        *influence,
        "helpful candidates",
        "fine-tuning on them",
    ]
    assert waiting(begun(tmp_path / "other", method="self_instruct")) == []


def test_a_stage_that_is_done_says_what_came_of_it(tmp_path: Path):
    folder = write_run(tmp_path / "run", until="split", optimise="bootstrap", signal="random",
                       preferences=JUDGED)  # fmt: skip
    directory = RunDirectory.existing(folder)
    directory.stage("iteration-1/random").finish({"rows": 24})
    directory.stage("iteration-1/helpful").finish({"helpful": 6, "candidates": 24})
    table = " ".join(render(summarise(directory)).split())
    assert "| random scores | 24 random scores |" in table
    assert "| helpful candidates | 6 of 24 |" in table
    assert "| fine-tuning on them | not done yet |" in table
