import json
import os

import pytest

from montessori_jax.config import RunConfig
from montessori_jax.config_file import build
from montessori_jax.errors import UserError
from montessori_jax.runs import (
    Journal,
    RunDirectory,
    differences,
    value_hash,
    write_atomic,
)

INPUTS = {"seeds": "aa", "teacher": "bb"}


def config(tmp_path, **values):
    return build(RunConfig, {"run_dir": str(tmp_path / "run"), **values}, "test")


def test_the_same_settings_open_the_directory_again(tmp_path):
    first = RunDirectory.create(config(tmp_path), INPUTS)
    first.stage("a/b").finish({"rows": 3})
    again = RunDirectory.create(config(tmp_path), INPUTS)
    assert again.stage("a/b").result() == {"rows": 3}
    assert again.stage("a/c").result() is None


def test_changed_settings_are_refused_with_the_difference(tmp_path):
    RunDirectory.create(config(tmp_path), INPUTS).stage("iteration-1/dpo").finish({})
    with pytest.raises(UserError, match=r"dpo\.beta: 0\.1 -> 0\.2") as caught:
        RunDirectory.create(config(tmp_path, dpo={"beta": 0.2}), INPUTS)
    assert "\n" not in str(caught.value)


def test_a_setting_that_came_later_has_its_default(tmp_path):
    first = RunDirectory.create(config(tmp_path), INPUTS)
    first.stage("iteration-1/dpo").finish({})
    written = first.path / "config.yaml"
    lines = written.read_text().splitlines(keepends=True)
    written.write_text("".join(line for line in lines if line.strip() != "beta: 0.1"))
    assert len(written.read_text().splitlines()) == len(lines) - 1
    with pytest.raises(UserError, match=r"dpo\.beta: 0\.1 -> 0\.2"):
        RunDirectory.create(config(tmp_path, dpo={"beta": 0.2}), INPUTS)
    RunDirectory.create(config(tmp_path), INPUTS)


def test_settings_of_a_stage_that_is_not_done_may_change_and_it_begins_again(tmp_path):
    directory = RunDirectory.create(config(tmp_path), INPUTS)
    begun = directory.stage("iteration-1/dpo").path / "metrics.jsonl"
    begun.write_text("{}")
    RunDirectory.create(config(tmp_path, dpo={"beta": 0.2}), INPUTS)
    assert not begun.exists()
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        RunDirectory.create(config(tmp_path, seed=1, dpo={"beta": 0.2}), INPUTS)


def test_changed_inputs_are_refused(tmp_path):
    RunDirectory.create(config(tmp_path), INPUTS)
    with pytest.raises(UserError, match="seeds: aa -> cc"):
        RunDirectory.create(config(tmp_path), {**INPUTS, "seeds": "cc"})


def test_more_iterations_and_other_intervals_are_the_same_run(tmp_path):
    RunDirectory.create(config(tmp_path, iterations=1), INPUTS)
    RunDirectory.create(config(tmp_path, iterations=3, sft={"checkpoint_every": 7}), INPUTS)


def test_another_judge_is_refused_once_students_were_judged(tmp_path):
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "a"}
    directory = RunDirectory.create(config(tmp_path, judge=judge), INPUTS)
    directory.stage("iteration-1/evaluate-tuned").finish({})
    # How it is asked may change, who it is may not.
    RunDirectory.create(config(tmp_path, judge={**judge, "retries": 1}), INPUTS)
    with pytest.raises(UserError, match=r"judge\.model: a -> b"):
        RunDirectory.create(config(tmp_path, judge={**judge, "model": "b"}), INPUTS)


def test_an_evaluation_may_do_less_at_one_time(tmp_path):
    """The advice for too little memory, which loses nothing that was made."""
    directory = RunDirectory.create(config(tmp_path), INPUTS)
    directory.stage("iteration-1/evaluate-untrained").finish({})
    begun = directory.stage("iteration-1/evaluate-tuned").path / "answers.jsonl"
    begun.write_text("{}")
    RunDirectory.create(config(tmp_path, evaluation={"rows_per_pass": 1}), INPUTS)
    assert begun.exists()


def test_two_processes_cannot_hold_one_directory(tmp_path):
    directory = RunDirectory.create(config(tmp_path), INPUTS)
    with directory.locked(), pytest.raises(UserError, match="in use"), directory.locked():
        pass
    with directory.locked():
        pass


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        RunDirectory.existing(tmp_path)


def test_differences_ignore_what_decides_nothing():
    old = {"run_dir": "a", "sft": {"checkpoint_every": 1, "rows": 2}}
    new = {"run_dir": "b", "sft": {"checkpoint_every": 5, "rows": 3}, "seed": 0}
    assert differences(old, new) == ["seed: (absent) -> 0", "sft.rows: 2 -> 3"]


def test_value_hash_ignores_key_order_and_nothing_else():
    assert value_hash({"a": 1, "b": [2]}) == value_hash({"b": [2], "a": 1})
    assert value_hash({"a": 1}) != value_hash({"a": 2})


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"x\.json"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


KEY = {"model": "m", "settings": {"lr": 1.0}}


def test_journal_keeps_what_was_appended(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, KEY).append({"a": 1}, {"a": 2})
    again = Journal(path, KEY)
    assert again.records == [{"a": 1}, {"a": 2}]
    again.append({"a": "three, with ü and \u2028"})
    assert Journal(path, KEY).records[-1] == {"a": "three, with ü and \u2028"}


@pytest.mark.parametrize("torn", ['{"a": 3', '{"a": 3}', "\x00\x00"])
def test_journal_drops_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "j.jsonl"
    Journal(path, KEY).append({"a": 1})
    with open(path, "a") as file:
        file.write(torn)
    journal = Journal(path, KEY)
    assert journal.records == [{"a": 1}]
    journal.append({"a": 2})
    assert Journal(path, KEY).records == [{"a": 1}, {"a": 2}]


def test_journal_of_other_settings_is_refused_with_the_difference(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, KEY).append({"a": 1})
    with pytest.raises(UserError, match=r"settings\.lr: 1\.0 -> 2\.0"):
        Journal(path, {"model": "m", "settings": {"lr": 2.0}})
    assert json.loads(path.read_text().splitlines()[1]) == {"a": 1}
