"""Along DPO and along training: what is kept, written and measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from montessori_jax.config import RunConfig
from montessori_jax.config_file import build
from montessori_jax.data.tables import read_table
from montessori_jax.errors import UserError
from tests.evaluation.judge_server import JudgeServer
from tests.methods.small import go, settings, stages

PROMPTS = 3


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both curves, its teacher tuned by an adapter."""
    place = tmp_path_factory.mktemp("curve") / "run"
    prompts = place.parent / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": "Name a river."}]))
    judge = JudgeServer(lambda content: "[{'model': 'model_1', 'rank': 1}, "
                        "{'model': 'model_2', 'rank': 2}]")  # fmt: skip
    changed = {
        "evaluation": {
            "max_length": 256, "evaluations": ["alpaca_eval"],
            "alpaca_eval": {"prompts": str(prompts), "answers": {"max_tokens": 4}},
        },
        "judge": {"base_url": judge.url, "model": "m", "api_key_env": ""},
        "dpo": {"keep_every": 2, "lora_rank": 4, "batch_size": 1, "max_length": 512,
                "learning_rate": 4e-3, "warmup_ratio": 0},  # other texts in so few steps
        "curve": {"prompts": PROMPTS, "student_states": 2, "scored": 2},
        "compare_self_instruct": True,
        "sft": {"rows": 4, "batch_size": 1, "learning_rate": 1e-3, "warmup_ratio": 0},
    }  # fmt: skip
    try:
        go(settings(teacher, place, **changed))
    finally:
        judge.close()
    return place


def test_along_dpo(run: Path):
    place = run / "iteration-1"
    steps = stages(run)["dpo"]["steps"]
    assert steps > 2
    rows = json.loads((place / "curve" / "teacher_curve.json").read_text())["teacher_curve"]
    assert [row["step"] for row in rows] == sorted({0, steps, *range(2, steps, 2)})
    # The ends are the untuned and the tuned teacher, with equal prompts and draws.
    for step, name in ((0, "untuned"), (steps, "tuned")):
        one, other = (
            place / f"synthesise-{end}" / "data.parquet" for end in (f"curve-{step}", name)
        )
        assert one.read_bytes() == other.read_bytes()
    assert len({row["student_loss"] for row in rows}) > 1
    for row in rows:
        made = stages(run)[f"synthesise-curve-{row['step']}"]
        scored = stages(run)[f"influence-curve-{row['step']}"]
        assert row["yield"] == pytest.approx(made["kept"] / made["candidates"], abs=1e-4)
        assert row["influence"] == scored["mean"]
        assert scored["scored"] == 2
        assert row["influence_error"] > 0
        scores = read_table(place / f"influence-curve-{row['step']}" / "scores.parquet")
        low, *_, high = row["influence_quantiles"]
        assert len(row["influence_quantiles"]) == 5
        ends = sorted(one["influence"] for one in scores)
        # Of two, q of the way from the lower to the higher.
        assert [low, high] == pytest.approx([0.95 * ends[0] + 0.05 * ends[1],
                                             0.05 * ends[0] + 0.95 * ends[1]])  # fmt: skip
        assert row["influence_quantiles"][2] == pytest.approx(np.mean(ends))
        trained = stages(run)[f"train-curve-{row['step']}"]
        assert trained["rows"] == stages(run)["train-curve-0"]["rows"]


def test_the_students_of_the_curve_have_the_runs_evaluations(run: Path):
    """Against the run's own Self-Instruct, which has answered already."""
    place = run / "iteration-1"
    rows = json.loads((place / "curve" / "teacher_curve.json").read_text())["teacher_curve"]
    assert "reference_loss" not in stages(run)["evaluate-tuned"]
    answers = "alpaca_eval_baseline_answers.jsonl"
    for row in rows:
        found = row["evaluation"]
        assert found == stages(run)[f"evaluate-curve-{row['step']}"]
        assert found["alpaca_eval"]["baseline"] == "self_instruct"
        own = place / f"evaluate-curve-{row['step']}" / answers
        assert own.read_text() == (place / "evaluate-tuned" / answers).read_text()
        assert row["student_loss"] == found["reference_loss"]["loss"]


def test_along_training(run: Path):
    path = run / "iteration-1" / "curve" / "influence_curve.json"
    rows = json.loads(path.read_text())["influence_curve"]
    steps = stages(run)["train-tuned"]["steps"]
    assert steps >= 2
    assert [(row["data"], row["step"]) for row in rows] == [
        (name, step) for name in ("untuned", "tuned") for step in range(2, steps + 1, 2)
    ]
    for row in rows:
        assert row["share"] in (0, 0.5, 1)
        found = stages(run)[f"influence-along-{row['data']}-{row['step']}"]
        assert row["share"] == found["positive_share"]


def test_a_curve_without_teachers_or_without_a_student_is_refused():
    with pytest.raises(UserError, match="needs teachers to compare"):
        build(RunConfig, {"curve": {"prompts": 2}}, "test")
    values = {
        "curve": {"prompts": 2}, "dpo": {"keep_every": 2}, "signal": "random",
        "preferences": {"rule": "extremes"},
    }  # fmt: skip
    with pytest.raises(UserError, match="needs a warmed-up student"):
        build(RunConfig, values, "test")
