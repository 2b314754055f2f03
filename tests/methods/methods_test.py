"""Each method whole, on a tiny teacher that writes instructions and judgements."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from montessori_jax.config import RunConfig
from montessori_jax.config.methods import MethodName
from montessori_jax.config_file import build
from montessori_jax.costs import read_ledger
from montessori_jax.data.rows import read_rows
from montessori_jax.data.tables import read_table
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.methods import METHODS
from montessori_jax.models.sources import model_fingerprint
from montessori_jax.pipeline import stage_processes
from montessori_jax.runs import RunDirectory
from tests.end_to_end.artifacts import artifacts
from tests.end_to_end.resume_test import CONFIG
from tests.methods.small import SMALL, StopAfter, go, settings, stages

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Montessori-Instruct, twice round, with Self-Instruct beside it."""
    place = tmp_path_factory.mktemp("montessori") / "run"
    few = {**CONFIG["sft"], "rows": 3}
    go(settings(teacher, place, iterations=2, compare_self_instruct=True, sft=few))
    return place


@pytest.fixture(scope="module")
def rewarded(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Self-Reward, twice round."""
    place = tmp_path_factory.mktemp("self-reward") / "run"
    go(settings(teacher, place, method="self_reward", iterations=2))
    return place


@pytest.fixture(scope="module")
def expanded(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LLM2LLM, twice round."""
    place = tmp_path_factory.mktemp("llm2llm") / "run"
    go(settings(teacher, place, method="llm2llm", iterations=2))
    return place


def ends_the_same(whole: Path, config: RunConfig, iteration: int, journal: str, lines: int) -> None:
    """Stopped in the middle of what ``journal`` is of, a run ends as ``whole`` did.

    It has what ``whole`` had before that stage.
    """
    place, own = Path(config.run_dir), f"iteration-{iteration}"
    order = [row["stage"] for row in read_ledger(whole / "costs.jsonl")]
    stage = f"{own}/{journal.split('/')[0]}"
    for name in order[: order.index(stage)]:
        shutil.copytree(whole / name, place / name)
    with pytest.raises(Interrupted):
        go(config, StopAfter(place / own / journal, lines))
    assert not (place / stage / "done.json").exists()
    stopped, ended = (run / own / journal for run in (place, whole))
    assert ended.read_bytes().startswith(stopped.read_bytes())
    assert ended.stat().st_size > stopped.stat().st_size
    go(config)
    one, other = artifacts(whole, place), artifacts(place, whole)
    names = [name for name in one if name.startswith(own)]
    assert names == [name for name in other if name.startswith(own)]
    assert [name for name in names if one[name] != other[name]] == []


def test_every_name_has_its_method():
    assert METHODS.keys() == set(get_args(MethodName))


def test_no_finetuning_evaluates_the_student_and_reads_no_teacher(teacher, tmp_path):
    config = settings(teacher, tmp_path / "run", method="no_finetuning")
    said = go(replace(config, teacher=str(tmp_path / "absent"), iterations=2))
    assert stages(tmp_path / "run").keys() == {"evaluate-untrained"}
    assert "no_finetuning does not go round: one iteration instead of 2" in said
    table = "\n".join(said)
    assert "| untrained " in table
    assert "not done yet" not in table


def test_self_instruct_is_montessoris_untuned_branch(teacher, tuned, tmp_path):
    """The same bytes, if neither teacher's yield is below ``sft.rows``."""
    alone = tmp_path / "run"
    few = {**CONFIG["sft"], "rows": 3}
    go(settings(teacher, alone, method="self_instruct", iterations=1, sft=few))
    one, other = artifacts(tuned), artifacts(alone)
    shared = [f"iteration-1/{stage}-untuned/" for stage in ("synthesise", "train", "evaluate")]
    names = [name for name in other if name.startswith(tuple(shared))]
    assert len(names) > 10
    assert [name for name in names if one[name] != other[name]] == []
    assert stages(alone)["train-untuned"]["rows"] == 3


def test_an_address_may_teach_where_nothing_is_tuned():
    for name in ("self_instruct", "llm2llm"):
        assert not stage_processes(RunConfig(method=name, generator="url"), "url")
    with pytest.raises(UserError, match="which the method montessori does"):
        stage_processes(RunConfig(generator="url"), "url")


def test_self_reward_pairs_the_best_with_the_worst_response(rewarded):
    first = rewarded / "iteration-1"
    found = stages(rewarded)
    assert found["judge"]["rows"] == found["respond"]["responses"]
    assert found["judge"]["judgements"] + found["judge"]["unparsed"] == 2 * found["judge"]["rows"]
    assert found["judge"]["unparsed"] > 0, "a tiny judge forgets its score now and then"
    scores = {row["id"]: row["score"] for row in read_table(first / "judge/scores.parquet")}
    by_prompt: dict[str, dict[str, float]] = {}
    for row in read_table(first / "respond"):
        if scores[row["id"]] is not None:
            by_prompt.setdefault(row["prompt_id"], {})[row["response"]] = scores[row["id"]]
    pairs = read_table(first / "preferences/pairs")
    assert pairs
    for pair in pairs:
        competing = by_prompt[pair["prompt_id"]]
        assert competing[pair["chosen"]] == max(competing.values()) == pair["chosen_score"]
        assert competing[pair["rejected"]] == min(competing.values()) == pair["rejected_score"]
        (asked,) = json.loads(pair["prompt"])
        instruction = next(
            row["instruction"] for row in read_table(first / "respond")
            if row["prompt_id"] == pair["prompt_id"]
        )  # fmt: skip
        assert asked == {"role": "user", "content": instruction}


def continued(place: Path, teacher: Path) -> None:
    """The second iteration began with the first one's teacher, and with the student as given."""
    tuned = model_fingerprint(str(place / "iteration-1/dpo/teacher"))
    assert tuned != model_fingerprint(str(teacher))
    for number, expected in ((1, model_fingerprint(str(teacher))), (2, tuned)):
        journal = place / f"iteration-{number}/generate/instructions.jsonl"
        assert json.loads(journal.read_text().splitlines()[0])["key"]["teacher"] == expected
    card = (place / "iteration-2/dpo/teacher/README.md").read_text()
    assert str(place / "iteration-1/dpo/teacher") in card
    card = (place / "iteration-2/train-tuned/student/README.md").read_text()
    assert f"From `{teacher}`" in card


def test_the_teacher_is_continued_and_the_student_begins_anew(tuned, rewarded, teacher):
    continued(tuned, teacher)
    continued(rewarded, teacher)
    stage = "evaluate-untrained"
    assert stage in stages(tuned)
    assert stage not in stages(tuned, 2)


def test_llm2llm_expands_the_seeds_with_the_highest_losses(expanded):
    seeds = {row.id: row for row in read_rows("package:seeds").rows}
    for number in (1, 2):
        folder = expanded / f"iteration-{number}"
        losses = {row["id"]: row["loss"] for row in read_table(folder / "losses/scores.parquet")}
        assert list(losses) == list(seeds)[:6]
        hard = sorted(losses, key=lambda one: -losses[one])[:3]
        asked = read_table(folder / "expand/prompts.jsonl")
        assert len(asked) == 3
        for prompt, seed in zip(asked, hard, strict=True):
            assert seeds[seed].instruction in prompt["prompt"][1]["content"]
    first, second = stages(expanded), stages(expanded, 2)
    assert first.keys() - second.keys() == {"train-seeds", "evaluate-seeds", "evaluate-untrained"}
    assert second["mix"]["rows"] == 9  # sft.rows
    assert set(second["mix"]["written"]) == {"iteration-1", "iteration-2"}
    origins = [row["id"].split("/")[0] for row in read_table(expanded / "iteration-2/mix")]
    assert origins.count("seed") == 6
    # The student of the second iteration is measured where the first one's was trained.
    journals = [expanded / f"iteration-{number}/losses/losses.jsonl" for number in (1, 2)]
    keys = [json.loads(path.read_text().splitlines()[0])["key"] for path in journals]
    trained = expanded / "iteration-1/train-expanded/student"
    assert keys[1]["student"] == model_fingerprint(str(trained)) != keys[0]["student"]


def test_stopped_while_it_responds_self_reward_ends_the_same(rewarded, teacher, tmp_path):
    config = settings(teacher, tmp_path / "run", method="self_reward", iterations=1)
    ends_the_same(rewarded, config, 1, "respond/responses.jsonl", 3)


def test_stopped_while_it_judges_self_reward_ends_the_same(rewarded, teacher, tmp_path):
    config = settings(teacher, tmp_path / "run", method="self_reward", iterations=1)
    ends_the_same(rewarded, config, 1, "judge/judgements.jsonl", 3)


def test_stopped_while_it_expands_llm2llm_ends_the_same(expanded, teacher, tmp_path):
    config = settings(teacher, tmp_path / "run", method="llm2llm", iterations=2)
    ends_the_same(expanded, config, 2, "expand/instructions.jsonl", 2)


def test_a_stage_in_a_process_of_its_own_does_the_same(expanded, teacher, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(expanded, place)
    for name in ("done.json", "scores.parquet", "losses.jsonl"):
        (place / "iteration-2/losses" / name).unlink()
    go(settings(teacher, place, method="llm2llm", iterations=2, stage_processes="always"))
    before, after = artifacts(expanded, place), artifacts(place, expanded)
    config = "config.yaml"  # which says where stages run
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [config]


@pytest.mark.parametrize(
    ("signal", "optimise", "expected"),
    [
        ("training_loss", "both", {"warmup", "losses", "losses-responses", "respond"}),
        ("judge", "bootstrap", {"judge", "helpful", "bootstrap"}),
        pytest.param("random", "response", {"respond", "random-responses"}, marks=SLOW),
        pytest.param("influence", "both", {"influence", "influence-responses"}, marks=SLOW),
        pytest.param("influence", "bootstrap", {"helpful", "bootstrap"}, marks=SLOW),
        pytest.param("judge", "instruction", {"judge", "preferences", "dpo"}, marks=SLOW),
        pytest.param("random", "instruction", {"random", "preferences", "dpo"}, marks=SLOW),
    ],
)
def test_the_ablations_of_montessori(teacher, tmp_path, signal, optimise, expected):
    place = tmp_path / "run"
    # So many that a tiny judge's means differ: most of its judgements have no score.
    judging = {**SMALL["judging"], "samples": 6}
    changed = {"iterations": 1, "signal": signal, "optimise": optimise, "judging": judging}
    if signal == "training_loss":  # as the paper's configs warm up
        changed["warmup"] = {**CONFIG["warmup"], "lora_rank": 4}
    go(settings(teacher, place, **changed))
    found = stages(place)
    assert expected <= found.keys()
    assert ("warmup" in found) == (signal in ("influence", "training_loss"))
    assert ("dpo" in found) == (optimise != "bootstrap")
    assert found["evaluate-tuned"]["reference_loss"]["loss"] > 0
    folder = place / "iteration-1"
    if optimise == "both":
        pairs = sum(found[name]["training"] for name in ("preferences", "preferences-responses"))
        assert found["dpo"]["pairs"] == pairs
    if optimise == "bootstrap":
        assert found["bootstrap"]["rows"] == found["helpful"]["helpful"]
        tuned = model_fingerprint(str(folder / "bootstrap/teacher"))
        assert tuned != model_fingerprint(str(teacher))
    if signal == "training_loss":
        losses = {row["id"]: row["loss"] for row in read_table(folder / "losses/scores.parquet")}
        assert np.isfinite(list(losses.values())).all()
        for pair in read_table(folder / "preferences/pairs"):
            own = [loss for name, loss in losses.items() if name.startswith(pair["prompt_id"])]
            assert (pair["chosen_loss"], pair["rejected_loss"]) == (max(own), min(own))


def test_every_stage_is_in_the_ledger(expanded):
    known = {row["stage"] for row in read_ledger(expanded / "costs.jsonl")}
    done = {f"iteration-{n}/{name}" for n in (1, 2) for name in stages(expanded, n)}
    assert known == done


def test_judging_again_by_another_judge_is_refused(rewarded, teacher):
    config = settings(teacher, rewarded, method="self_reward", iterations=2)
    other = replace(config, judging=replace(config.judging, max_tokens=13))
    with pytest.raises(UserError, match=r"judging\.max_tokens: 12 -> 13"):
        RunDirectory.create(other, {})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "self_reward"}, "set preferences.rule: extremes"),
        ({"signal": "random"}, "set preferences.rule: extremes"),
        ({"method": "llm2llm", "signal": "judge"}, "signal belongs to the method 'montessori'"),
        ({"method": "llm2llm", "sft": {"rows": 9}}, "leaves no room for what is written"),
        ({"judging": {"samples": 2}}, "2 judgements at temperature 0 are all the same"),
    ],
)
def test_settings_that_cannot_work_are_one_line(values, words):
    with pytest.raises(UserError, match=words) as caught:
        build(RunConfig, values, "my.yaml")
    assert "\n" not in str(caught.value)
