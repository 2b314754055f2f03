"""Along DPO and along training: what is kept, written and measured."""

import json
from pathlib import Path

import pytest

from montessori_jax.config import RunConfig
from montessori_jax.config_file import build
from montessori_jax.errors import UserError
from tests.methods.small import go, settings, stages

PROMPTS = 3


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both curves, its teacher tuned by an adapter."""
    place = tmp_path_factory.mktemp("curve") / "run"
    changed = {
        "dpo": {"keep_every": 2, "lora_rank": 4, "batch_size": 1, "max_length": 512,
                "learning_rate": 1e-3, "warmup_ratio": 0},
        "curve": {"prompts": PROMPTS, "student_states": 2, "scored": 2},
        "compare_self_instruct": True,
        "sft": {"rows": 4, "batch_size": 1, "learning_rate": 1e-3, "warmup_ratio": 0},
    }  # fmt: skip
    go(settings(teacher, place, **changed))
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
        trained = stages(run)[f"train-curve-{row['step']}"]
        assert trained["rows"] == stages(run)["train-curve-0"]["rows"]


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
