"""The report's numbers: the main table, measurements, costs, lengths, verbs, settings."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from montessori_jax.errors import UserError
from montessori_jax.evaluation.pairwise import summarise_pairs
from montessori_jax.report import verbs
from montessori_jax.report.lengths import measure_lengths
from montessori_jax.report.main_table import LOSS, baseline_of, measures, paired_change, students
from montessori_jax.report.measured import in_run, read_measured, win_rates
from montessori_jax.report.records import by_task, data_count, settings
from montessori_jax.report.run_data import labels, read_run
from montessori_jax.versions import NAME, recorded_versions, versions
from tests.report.run_folder import write_run


def test_the_main_table_has_a_row_a_student_with_paired_changes(tmp_path: Path):
    found = students([read_run(write_run(tmp_path / "run"), "run")])
    assert [one.name for one in found] == ["untrained", "untuned", "tuned"]
    assert [one.rows for one in found] == [0, 24, 24]
    assert str(found[2].measures[LOSS]) == "2.3000 ± 0.0500"
    assert baseline_of(found[0], found) is None
    baseline = baseline_of(found[2], found)
    assert baseline is found[0]
    # The same noise on every row: the difference is certain though the losses are not.
    change = paired_change(found[2], baseline)
    assert change is not None
    assert change.value == pytest.approx(-0.2)
    assert change.error == pytest.approx(0.0, abs=1e-9)


def test_a_paired_error_is_that_of_the_differences(tmp_path: Path):
    one, two, _ = students([read_run(write_run(tmp_path / "run"), "run")])
    one, two = replace(one, by_sample=[1.0, 2.0, 3.0]), replace(two, by_sample=[1.5, 2.0, 4.0])
    change = paired_change(two, one)
    assert change is not None
    # Differences .5, 0, 1: mean .5, standard deviation .5, over the root of three.
    assert (change.value, change.error) == pytest.approx((0.5, 0.5 / math.sqrt(3)))
    assert paired_change(replace(two, by_sample=[1.5, 2.0]), one) is None


def test_each_evaluation_gives_its_main_numbers():
    result = {
        "student": "s",
        "skipped": {"too long": 3},
        "alpaca_eval": {
            "win_rate": 40.0, "standard_error": 1.5, "length_controlled_win_rate": None,
            "wins": 3, "cost": {"dollars": 0.5},
        },
        "mt_bench": {"score": 6.25, "standard_error": None, "categories": {"math": {"score": 2.0}}},
        "lm_harness": {
            "groups": {"mmlu": {"acc": 0.5, "acc_stderr": 0.01}},
            "tasks": {
                "mmlu_law": {"acc": 0.4},
                "mmlu_mine": {"acc": 0.2},
                "arc": {"acc_norm": 0.3, "acc_norm_stderr": 0.02},
            },
            "group_subtasks": {"mmlu": ["mmlu_other"], "mmlu_other": ["mmlu_law"]},
        },
    }  # fmt: skip
    found = {name: str(one) for name, one in measures(result)}
    assert found == {
        "AlpacaEval, win rate, %": "40.00 ± 1.50",
        "MT-Bench, score of 10": "6.2500",
        "mmlu: acc": "0.5000 ± 0.0100",
        "mmlu_mine: acc": "0.2000",
        "arc: acc_norm": "0.3000 ± 0.0200",
    }


def alpaca(rate: float, **others: Any) -> dict[str, Any]:
    about = {"baseline": "self_instruct", "annotator": "ranking", "prompts": 805}
    found = {"win_rate": rate, "standard_error": 1.5, "cost": {"judge": "gpt-4o"}}
    return {"alpaca_eval": {**about, **found, **others}}


def test_numbers_of_one_name_may_be_compared():
    name = "AlpacaEval, win rate, % (against its own self_instruct; gpt-4o; ranking; 805 prompts)"
    results = [
        alpaca(40.0),
        alpaca(41.0, annotator="log-probs"),
        alpaca(42.0, cost={"judge": "qwen"}),
        alpaca(43.0, baseline="runs/a:2"),
        alpaca(44.0, prompts=10),
    ]
    assert next(iter(dict(measures(results[0])))) == name
    assert len({label for result in results for label, _ in measures(result)}) == len(results)
    bench = [
        {"mt_bench": {"score": 6.0, "questions": 80, "cost": {"judge": judge}}}
        for judge in ("gpt-4o", "qwen")
    ]
    assert [label for result in bench for label, _ in measures(result)] == [
        "MT-Bench, score of 10 (gpt-4o; 80 questions)",
        "MT-Bench, score of 10 (qwen; 80 questions)",
    ]


def test_rates_without_prompts_of_the_reference_set_are_told_where_there_are_any():
    apart = {"left_out": 12, "win_rate": 38.0, "standard_error": 2.0}
    found = dict(measures(alpaca(40.0, without_reference_prompts=apart)))
    assert [str(one) for one in found.values()] == ["40.00 ± 1.50", "38.00 ± 2.00"]
    assert list(found)[1].endswith("; 805 prompts; without the 12 of the reference set)")
    assert len(dict(measures(alpaca(40.0, without_reference_prompts={"left_out": 0})))) == 1


def test_tasks_of_the_harness_say_their_shots_and_settings():
    harness = {
        "groups": {"mmlu": {"acc": 0.5}, "mixed": {"acc": 0.5}},
        "tasks": {
            "mmlu_law": {"acc": 0.4, "shots": 5},
            "other": {"acc": 0.4, "shots": 0},
            "gsm8k": {"exact_match,strict": 0.25, "shots": 8},
        },
        "group_subtasks": {"mmlu": ["mmlu_law"], "mixed": ["mmlu_law", "other"]},
    }
    assert [label for label, _ in measures({"lm_harness": harness})] == [
        "mmlu: acc (5-shot)", "mixed: acc", "gsm8k: exact_match (strict; 8-shot)"
    ]  # fmt: skip
    settings = {"limit": 100, "chat_template": True, "max_length": 512}
    assert next(measures({"lm_harness": {**harness, **settings}}))[0] == (
        "mmlu: acc (5-shot; first 100 rows; chat template; inputs cut to 512 tokens)"
    )


def test_win_rates_count_ties_as_half_from_both_sides():
    rows = [
        {"a": "x", "b": "y", "wins": 6, "losses": 3, "ties": 1, "standard_error": 12.0},
        {"a": "y", "b": "z", "wins": 1, "losses": 0, "ties": 0},
        {"a": "z", "b": "y", "wins": 2, "losses": 1, "ties": 0},
        {"a": "x", "b": "z", "wins": 0, "losses": 0, "ties": 0},
    ]
    found = win_rates(rows)
    assert (found["x", "y"].rate, found["x", "y"].games, found["x", "y"].error) == (0.65, 10, 0.12)
    assert found["y", "x"].rate == pytest.approx(0.35)
    assert (found["y", "z"].rate, found["y", "z"].games, found["y", "z"].error) == (0.5, 4, None)
    assert ("x", "z") not in found  # never played


def test_win_rates_are_those_that_head_to_head_reports():
    compared = [("A", "B"), ("A", "B"), ("B", "A"), ("A", "A"), None, (None, "A")]
    result = summarise_pairs(compared)
    found = win_rates([{"a": "x", "b": "y", **result.as_row()}])
    assert result.win_rate is not None
    assert result.standard_error is not None
    assert found["x", "y"].rate == pytest.approx(result.win_rate / 100)
    assert found["y", "x"].rate == pytest.approx(1 - result.win_rate / 100)
    assert found["x", "y"].error == pytest.approx(result.standard_error / 100)
    assert found["x", "y"].games == result.judged == 5


def test_measurements_are_found_in_a_run_and_refused_by_name(tmp_path: Path):
    folder = write_run(tmp_path / "run", until="split")
    inside = folder / "iteration-1" / "teacher_curve.json"
    inside.write_text(json.dumps({"teacher_curve": [{"step": 0, "yield": 1.0}]}))
    (folder / "summary.json").write_text("{}")
    assert in_run(folder) == [inside]
    found = read_measured([("run", inside), ("run", inside)])
    assert list(found.teacher_curves) == ["run", "run, iteration-1/teacher_curve"]
    rounds = [tmp_path / f"iteration-{n}" / "curve" / "teacher_curve.json" for n in (1, 2, 3)]
    for place in rounds:
        place.parent.mkdir(parents=True)
        place.write_text(inside.read_text())
    found = read_measured(("run", place) for place in rounds)
    assert list(found.teacher_curves) == [
        "run", *(f"run, iteration-{n}/curve/teacher_curve" for n in (2, 3))
    ]  # fmt: skip
    for text, message in {
        "[1]": "no JSON object",
        "{": "is no JSON",
        '{"other": []}': "holds none of teacher_curve",
        '{"teacher_curve": [{"yield": 1}]}': "row 1 of teacher_curve has no step",
        '{"teacher_curve": [{"step": 1, "influence_quantiles": [0]}]}': "quantiles are not 5",
    }.items():
        inside.write_text(text)
        with pytest.raises(UserError, match=message):
            read_measured([("run", inside)])
    with pytest.raises(UserError, match="cannot be read"):
        read_measured([("absent", tmp_path / "absent.json")])


def test_costs_are_summed_by_task_and_divided_by_data(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    again = {"stage": "iteration-1/influence", "seconds": 4.0, "probed_tokens": 52, "dollars": 0.5}
    with open(folder / "costs.jsonl", "a", encoding="utf-8") as ledger:
        ledger.write(json.dumps({**again, "finished": True, "peak_memory_bytes": 1}) + "\n")
    found = by_task(read_run(folder, "run"))["influence"]
    assert found == {
        "seconds": 6.0, "tokens": 100, "dollars": 0.5, "attempts": 2, "peak": 2**30, "data": 24
    }  # fmt: skip
    assert data_count({"reference_loss": {"samples": 8}}) == 8
    assert data_count({}) == 0


def test_what_several_evaluations_took_is_divided_by_no_ones_data(tmp_path: Path):
    """805 judged prompts beside 8 held-out rows: dollars are of the former, not of the latter."""
    folder = write_run(tmp_path / "run")
    marker = folder / "iteration-1/evaluate-tuned/done.json"
    loss = json.loads(marker.read_text())
    marker.write_text(json.dumps(loss | alpaca(40.0)))
    row = {"stage": "iteration-1/evaluate-tuned", "seconds": 4.0, "dollars": 8.05}
    with open(folder / "costs.jsonl", "a", encoding="utf-8") as ledger:
        ledger.write(json.dumps({**row, "finished": True, "peak_memory_bytes": 1}) + "\n")
    found = by_task(read_run(folder, "run"))
    assert (found["evaluate-tuned"]["dollars"], found["evaluate-tuned"]["data"]) == (8.05, 0)
    assert found["evaluate-untuned"]["data"] == 8
    assert data_count({"student": "s", **alpaca(40.0)}) == 805
    assert data_count({"mt_bench": {"questions": 80}}) == 80
    tasks = {"a": {"samples": 5}, "b": {"samples": 7}, "c": {}}
    assert data_count({"lm_harness": {"tasks": tasks}}) == 12


def test_lengths_are_tokens_where_there_is_a_tokenizer_else_words(tmp_path: Path, monkeypatch):
    from montessori_jax.data.rows import read_rows
    from tests.tiny_world import tiny_tokenizer

    monkeypatch.setattr("montessori_jax.report.lengths.MOST", 10)
    folder = write_run(tmp_path / "run", response="three words here")
    iteration = read_run(folder, "run").iterations[0]
    file = iteration.datasets["synthesise-tuned"]
    found = measure_lengths(iteration, file)
    assert (found.unit, found.rows, found.measured) == ("words", 24, 10)
    assert found.responses.tolist() == [3] * 10
    tokenizer = tiny_tokenizer([row.instruction for row in read_rows("package:seeds").rows])
    tokenizer.save_pretrained(folder / "iteration-1" / "train-tuned" / "student")
    found = measure_lengths(iteration, file)
    assert found.unit == "tokens"
    assert found.responses.tolist() == [len(tokenizer("three words here")["input_ids"])] * 10


def test_root_verbs_and_the_nouns_that_they_act_on(tmp_path: Path):
    if not verbs.available():
        pytest.skip("needs the extra verbs")
    texts = ("Write a story about a dog. Then stop.", "Write a story.", "What is it?", "Stop!")
    folder = write_run(tmp_path / "run", texts=texts, prompts=1)
    found = verbs.root_verbs(folder / "iteration-1/synthesise-tuned/data.parquet")
    assert found.verbs["write"] == 2
    assert found.nouns["write", "story"] == 2
    assert (found.parsed, found.rows) == (4, 4)
    assert "be" not in found.verbs


def test_settings_that_differ_are_marked_and_listed_first(tmp_path: Path):
    runs = [
        read_run(write_run(tmp_path / "a", until="split"), "a"),
        read_run(write_run(tmp_path / "b", until="split", seed=3), "b"),
    ]
    page = settings(runs)
    assert '<th scope="row">seed ≠</th><td class="differs">0</td><td class="differs">3</td>' in page
    assert '<th scope="row">synthesis_prompts</th>' in page
    assert f">{versions()['jax']}<" in page


def test_versions_are_recorded_once_each(tmp_path: Path):
    folder = write_run(tmp_path / "run", until="split")
    assert recorded_versions(folder) == [versions()]
    (folder / NAME).write_text(json.dumps([{"jax": "0.0"}]))
    write_run(folder, until="split")
    write_run(folder, until="split")
    assert recorded_versions(folder) == [{"jax": "0.0"}, versions()]
    assert recorded_versions(tmp_path) == []


def test_labels_tell_runs_apart(tmp_path: Path):
    paths = [tmp_path / "x" / "one", tmp_path / "y" / "one"]
    assert labels(paths) == ["x/one", "y/one"]
    assert labels(paths[:1]) == ["one"]


def test_what_is_missing_is_told_wherever_a_run_was_stopped(tmp_path: Path):
    def missing(name: str, **settings: Any) -> list[str]:
        return read_run(write_run(tmp_path / name, **settings), name).missing

    assert missing("done") == []
    assert missing("more", iterations=2) == ["iteration 2 has not begun"]
    (tmp_path / "more" / "summary.json").touch()
    assert missing("more", iterations=2) == []  # of a method that does not go round
    assert missing("early", until="dpo") == [
        "iteration 1: dpo is not done",
        "iteration 1: no student is evaluated yet",
    ]
    # Between two stages, where no folder tells of the next one.
    late = write_run(tmp_path / "late", until="evaluate-tuned")
    (late / "iteration-1/evaluate-tuned").rmdir()
    assert read_run(late, "late").missing == ["iteration 1: evaluate-tuned has not begun"]


def test_students_and_data_of_curves_are_left_to_the_curves(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    for stage in ("evaluate-tuned", "synthesise-tuned"):
        kind = stage.partition("-")[0]
        shutil.copytree(folder / "iteration-1" / stage, folder / f"iteration-1/{kind}-curve-40")
    with open(folder / "costs.jsonl", "a", encoding="utf-8") as ledger:
        for step in (0, 40):
            row = {"stage": f"iteration-1/synthesise-curve-{step}", "finished": True}
            ledger.write(json.dumps({**row, "seconds": 1.5, "peak_memory_bytes": 1}) + "\n")
    run = read_run(folder, "run")
    assert [one.name for one in students([run])] == ["untrained", "untuned", "tuned"]
    assert list(run.iterations[0].datasets) == [
        "generate",
        "synthesise-tuned",
        "synthesise-untuned",
    ]
    assert by_task(run)["synthesise-curve"]["seconds"] == 3.0
