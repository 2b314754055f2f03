"""The harness on a tiny model: beside its own class for transformers, and as an evaluation."""

import json
import signal

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from montessori_jax import cluster
from montessori_jax.cli import run
from montessori_jax.config import EvaluationConfig, HarnessConfig, JudgeConfig
from montessori_jax.costs import Meter
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.evaluation import Context, lm_harness
from montessori_jax.evaluation.lm_harness import check_tasks, load_tasks, summary
from montessori_jax.evaluation.lm_harness.model import MontessoriLM
from montessori_jax.evaluation.requirements import check_evaluations
from montessori_jax.models.sources import load_model
from montessori_jax.report import lines
from montessori_jax.work import Work
from tests.evaluation.harness_tasks import (
    CHOICE,
    WHOLE,
    WRITTEN,
    read_lines,
    write_task,
)
from tests.meshes import mesh_on
from tests.tiny_world import write_tiny_teacher

ROWS = [
    {"query": f"Question: what comes after {n}?", "choices": ["one", "two more", "the third"],
     "gold": n % 3} for n in range(9)
]  # fmt: skip
ASKED = [{"question": f"Write {n} words.", "answer": "no"} for n in range(3)]
TEXTS = [{"text": "a word and another " * n} for n in (1, 40)]
TASKS = ("pick:2", "write", "whole")


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return str(write_tiny_teacher(tmp_path_factory.mktemp("student"), prompts=8))


@pytest.fixture(scope="module")
def ours(student):
    return load_model(student)


@pytest.fixture(scope="module")
def theirs(student):
    return AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("tasks")
    write_task(place, "pick", {"test": ROWS[2:], "shots": ROWS[:2]}, CHOICE)
    drawn = {"until": ["\n\n", "."], "max_gen_toks": 20, "do_sample": False}
    write_task(place, "write", {"test": ASKED}, {**WRITTEN, "generation_kwargs": drawn})
    write_task(place, "whole", {"test": TEXTS}, WHOLE)
    write_task(place, "zero", {"test": ROWS}, {**CHOICE, "num_fewshot": 0})
    write_task(place, "labelled", {"test": ROWS}, {**CHOICE, "tag": ["tagged"]})
    (place / "both.yaml").write_text("group: both\ntask: [pick, write]\n")
    (place / "over.yaml").write_text(
        "group: over\ntask: [{task: pick, num_fewshot: 1}, {group: in, task: [{task: both}]}]\n"
    )
    return str(place)


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


PAIRS = [
    ("", "no context"),
    ("a context with a space at its end ", "and what follows"),
    ("Question: 1?\nAnswer:", " one"),
    ("Question: 1?\nAnswer:", " two more"),
    ("Question: 1?\nAnswer:", " one"),
    ("<|im_end|>begins as a text does", " and goes on"),
    ("much too long for so few positions " * 20, "is cut on its left"),
]


def pair_of_models(ours, theirs, max_length, **options):
    settings = HarnessConfig(max_length=max_length, tokens_per_pass=256)
    model, tokenizer = theirs
    other = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=2,
                 max_length=max_length, **options)  # fmt: skip
    return MontessoriLM(ours, settings=settings, **options), other


def test_pairs_are_encoded_cut_and_scored_as_by_the_harness(ours, theirs):
    mine, other = pair_of_models(ours, theirs, 48)
    requests = asked("loglikelihood", *PAIRS)
    found, expected = mine.loglikelihood(requests), other.loglikelihood(requests)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_long_texts_are_read_in_the_harness_windows(ours, theirs):
    mine, other = pair_of_models(ours, theirs, 32)
    requests = asked("loglikelihood_rolling", *((row["text"],) for row in TEXTS), ("short",))
    found, expected = mine.loglikelihood_rolling(requests), other.loglikelihood_rolling(requests)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("until", [["e"], ["\n"], [" the ", "zzz"], []])
def test_greedy_texts_end_where_the_harness_ends_them(ours, theirs, until):
    mine, other = pair_of_models(ours, theirs, 64)
    drawn = {"until": until, "max_gen_toks": 24, "do_sample": False}
    requests = asked("generate_until", *(
        (text, dict(drawn)) for text in ("Write a", "Name three colours of", "long " * 80)
    ))  # fmt: skip
    found, expected = mine.generate_until(requests), other.generate_until(requests)
    assert found == expected
    assert any(found)


def test_a_chat_is_written_by_the_tokenizers_template(ours, theirs):
    mine, other = pair_of_models(ours, theirs, 64)
    for turns, going_on in (
        ([{"role": "user", "content": "Say 1"}], True),
        ([{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "The"}], False),
    ):
        text = mine.apply_chat_template(turns, add_generation_prompt=going_on)
        assert text == other.apply_chat_template(turns, add_generation_prompt=going_on)
        assert "<|im_start|>user" in text
        assert mine.tok_encode(text) == other.tok_encode(text)


def test_a_mesh_changes_no_answer(student, ours):
    there = load_model(student, mesh=mesh_on("data", "tensor"))
    requests = asked("loglikelihood", *PAIRS)
    texts = asked("generate_until", ("Write a", {"until": ["."], "max_gen_toks": 8}))
    lone, split = (
        MontessoriLM(one, settings=HarnessConfig(max_length=48, tokens_per_pass=256))
        for one in (ours, there)
    )
    np.testing.assert_allclose(
        [one[0] for one in split.loglikelihood(requests)],
        [one[0] for one in lone.loglikelihood(requests)],
        atol=1e-4,
    )
    assert split.generate_until(texts) == lone.generate_until(texts)


def test_what_cannot_be_drawn_is_one_line(ours):
    model = MontessoriLM(ours)
    with pytest.raises(UserError, match="num_beams"):
        model.generate_until(asked("generate_until", ("a", {"num_beams": 4})))
    with pytest.raises(UserError, match="positions"):
        model.generate_until(asked("generate_until", ("a", {"max_gen_toks": 5000})))


def context(student, folder, place, **options):
    harness = HarnessConfig(tasks=TASKS, include_path=folder, tokens_per_pass=256, **options)
    settings = EvaluationConfig(evaluations=("lm_harness",), harness=harness)
    work = Work(place, 0, Meter(None, "evaluate"), quiet=True)
    return Context(student, settings, work, heldout="")


def test_an_evaluation_by_name_gives_scores_logs_and_costs(student, folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    chosen = ("--evaluations", "lm_harness", "--harness-tasks", *TASKS)
    place = ("--harness-include-path", folder, "--harness-limit", "2", "--out", str(out))
    assert run(["evaluate", "--student", student, *chosen, *place, "--quiet"]) == 0
    result = json.loads(out.read_text())["lm_harness"]
    assert (result["limit"], result["chat_template"], result["max_length"]) == (2, False, 0)
    pick = result["tasks"]["pick"]
    assert (pick["shots"], pick["samples"], pick["version"]) == (2, 2, "1.0")
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= pick.keys()
    assert {"exact_match", "exact_match_stderr"} <= result["tasks"]["write"].keys()
    assert result["tasks"]["whole"]["word_perplexity"] > 1
    samples = read_lines(tmp_path / "found" / "lm_harness" / "pick.jsonl")
    assert len(samples) == 2
    assert samples[0]["arguments"][0][0].count("Question:") == 3
    accuracy = np.mean([sample["acc"] for sample in samples])
    assert pick["acc"] == pytest.approx(accuracy)
    [row] = read_lines(tmp_path / "found.metrics.jsonl")
    assert row["lm_harness"]["tasks"]["pick"]["acc"] == pick["acc"]
    assert "pick acc" in capsys.readouterr().out


def test_a_group_without_an_aggregate_has_no_score(ours, folder):
    tasks = load_tasks(["both"], folder)
    model = MontessoriLM(ours, settings=HarnessConfig(max_length=256, tokens_per_pass=256))
    found = summary(lm_eval.evaluate(model, task_dict=tasks, limit=1, bootstrap_iters=0))
    assert found["tasks"].keys() == {"pick", "write"}
    assert found["groups"] == {}
    assert found["group_subtasks"] == {"both": ["pick", "write"]}
    assert lines.harness({**found, "named": ["both"]}) == "2 tasks of lm-evaluation-harness"
    assert lines.harness({**found, "named": ["both", "pick"]}).startswith("pick acc ")
    # As earlier versions wrote it.
    found["tasks"]["both"] = {"shots": None, "samples": None, "version": "None"}
    assert lines.harness({**found, "named": ["both"]}) == "3 tasks of lm-evaluation-harness"


def test_a_run_that_was_stopped_asks_only_what_is_left(ours, folder, tmp_path):
    whole = context(ours, folder, tmp_path / "whole")
    expected = lm_harness(whole)
    stopped = context(ours, folder, tmp_path / "stopped")
    stopped.work.stop.signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        lm_harness(stopped)
    first = read_lines(tmp_path / "stopped" / "lm_harness.jsonl", start=1)
    again = context(ours, folder, tmp_path / "stopped")
    assert lm_harness(again) == expected
    every = read_lines(tmp_path / "stopped" / "lm_harness.jsonl", start=1)
    names = [one["request"] for one in every]
    assert 0 < len(first) < len(every) == len(set(names))
    counts = [one.work.meter.counts for one in (whole, stopped, again)]
    for kind in ("scored_tokens", "generated_tokens"):
        assert counts[0][kind] == counts[1].get(kind, 0) + counts[2][kind]
    done = context(ours, folder, tmp_path / "stopped")
    assert lm_harness(done) == expected
    assert not done.work.meter.counts


def test_the_harness_finds_the_model_by_name(student, folder):
    found = lm_eval.simple_evaluate(
        model="montessori",
        model_args=f"pretrained={student},max_length=512,data=1",
        tasks=["pick"],
        num_fewshot=1,
        limit=2,
        batch_size=2,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
    )
    assert found["n-samples"]["pick"]["effective"] == 2
    assert found["config"]["model_num_parameters"] > 1000


def test_the_papers_tasks_are_known_to_the_harness():
    known = TaskManager()
    names = dict(one.rsplit(":", 1) for one in HarnessConfig().tasks)
    assert names == {"mmlu": "0", "gpqa_main_zeroshot": "0", "arc_challenge": "25", "gsm8k": "8",
                     "hellaswag": "8"}  # fmt: skip
    assert names.keys() <= set(known.all_tasks)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["zero:3"], "zero-shot"),
        (["pick:"], "NAME:SHOTS"),
        (["pick", "pick:1"], "twice"),
    ],
)
def test_mistakes_in_tasks_are_one_line(folder, tasks, words):
    with pytest.raises(UserError, match=words):
        load_tasks(tasks, folder)


def test_a_folder_that_is_not_there_is_said():
    with pytest.raises(UserError, match="no such folder"):
        load_tasks(["pick"], "absent")


@pytest.mark.parametrize(
    ("task", "writing"),
    [("pick:2", False), ("write", True), ("both", True), ("over", True), ("tagged", False)],
)
def test_several_processes_are_refused_where_text_is_written(task, writing, folder, monkeypatch):
    harness = HarnessConfig(tasks=(task,), include_path=folder)
    settings = EvaluationConfig(evaluations=("lm_harness",), harness=harness)
    check_evaluations(settings, JudgeConfig(), self_instruct=False)
    monkeypatch.setattr(cluster, "count", lambda: 2)
    if writing:
        with pytest.raises(UserError, match=f"harness.tasks {task}: tasks that write text take"):
            check_tasks(harness)
    else:
        check_tasks(harness)


def test_own_tasks_and_their_shots(folder):
    loaded = load_tasks(["pick:2", "zero", "write"], folder)["tasks"]
    assert {name: task.get_config("num_fewshot") for name, task in loaded.items()} == {
        "pick": 2, "zero": 0, "write": 0,
    }  # fmt: skip
