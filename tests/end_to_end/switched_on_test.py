"""One `montessori run` with LoRA in every training stage, all trackers and the hub together.

Slow; small forms are `resume_test` and the tests of trackers, of the hub and of LoRA.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import yaml

from montessori_jax.models.adapter_folder import load_adapter
from montessori_jax.models.lora import merge
from montessori_jax.models.sources import load_model
from montessori_jax.trackers import scalars
from montessori_jax.training.checkpoints import read_about
from tests.end_to_end.resume_test import CONFIG, ROOT
from tests.fake_hub import fake_hub
from tests.tiny_world import write_tiny_teacher
from tests.tracker_files import tensorboard_scalars, trackio_scalars, wandb_scalars

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-2}
STAGES = ("warmup", "dpo", "train-untuned", "train-tuned")
pytestmark = pytest.mark.slow


class Ended(NamedTuple):
    """A run that ended."""

    teacher: Path
    run: Path
    output: str
    hub: dict[str, dict]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    for package in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(package, reason=f"needs {package}: pip install '.[trackers]'")
    folder = tmp_path_factory.mktemp("world")
    teacher = write_tiny_teacher(folder / "teacher")
    settings = {
        **CONFIG,
        "teacher": str(teacher),
        "student": str(teacher),
        "run_dir": str(folder / "run"),
        "tracker": ["tensorboard", "wandb", "trackio"],
        "tracker_project": "everything",
        "push_to_hub": "org/mine",
        **{name: {**CONFIG[name], **LORA} for name in ("warmup", "dpo", "sft")},
    }
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    with fake_hub() as hub:
        environment = {
            **os.environ,
            "XLA_FLAGS": "",
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_secret",
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(folder / "trackio"),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "montessori_jax.cli", "run", config],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Ended(teacher, folder / "run", done.stdout + done.stderr, hub.repositories)


def metrics(ended: Ended, stage: str) -> dict[int, dict[str, float]]:
    lines = (ended.run / "iteration-1" / stage / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: scalars(row) for row in rows}


def test_nothing_failed_and_every_stage_ended(ended):
    assert "warning: the tracker" not in ended.output
    assert "could not be pushed" not in ended.output
    summary = json.loads((ended.run / "summary.json").read_text())
    stages = summary["iterations"][0]["stages"]
    assert stages["influence"]["scored"] > 0
    assert stages["influence"]["spread"] > 0
    assert stages["influence"]["audit"]["agreement"]["spearman"] is not None
    assert stages["dpo"]["kl"] > 0
    assert stages["dpo"]["heldout_after"] != stages["dpo"]["heldout_before"]


def test_the_warm_student_is_an_adapter_that_influence_steps(ended):
    notes = read_about(ended.run / "iteration-1" / "warmup" / "state")
    assert notes["about"]["lora"]["rank"] == 4
    size = sum(p.stat().st_size for p in (ended.run / "iteration-1/warmup/state").rglob("*"))
    weights = (ended.teacher / "model.safetensors").stat().st_size
    assert size < weights / 2  # with both moments; a full state is three times the weights


@pytest.mark.parametrize("place", ["dpo/teacher", "train-tuned/student", "train-untuned/student"])
def test_a_merged_model_is_its_base_and_its_adapter_to_the_bit(ended, place):
    """The adapter of every stage is on the model that the stage started from."""
    merged = ended.run / "iteration-1" / place
    base = load_model(str(ended.teacher))
    spec, adapter = load_adapter(merged.parent / "adapter", base.model)
    assert (spec.rank, spec.alpha) == (4, 8.0)
    expected = merge(base.params, adapter, spec)
    found = load_model(str(merged)).params
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)
    moved = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(base.params), jax.tree.leaves(found), strict=True)
    ]
    assert max(moved) > 1e-3


def test_peft_reads_the_tuned_teacher_out_of_the_adapter(ended):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(np.random.default_rng(5).integers(3, 900, (3, 40)))
    base = AutoModelForCausalLM.from_pretrained(ended.teacher)
    adapted = PeftModel.from_pretrained(base, ended.run / "iteration-1/dpo/adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(ended.run / "iteration-1/dpo/teacher").eval()
    with torch.no_grad():
        found, expected = adapted(tokens).logits, merged(tokens).logits
        with adapted.disable_adapter():
            untuned = adapted(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (untuned - expected).abs().max() > 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_every_tracker_has_every_number_of_every_step(ended, stage):
    rows = metrics(ended, stage)
    assert len(rows) >= 2
    expected: dict[str, dict[int, float]] = {}
    for step, values in rows.items():
        for tag, value in values.items():
            expected.setdefault(tag, {})[step] = value
    assert "loss" in expected

    def holds(found: dict[str, dict[int, float]], rtol: float) -> None:
        for tag, series in expected.items():
            assert found[tag].keys() == series.keys(), tag
            for step, value in series.items():
                assert found[tag][step] == pytest.approx(value, rel=rtol, abs=1e-30), (tag, step)

    logs, full = ended.run / "tracker", f"iteration-1/{stage}"
    holds(tensorboard_scalars(logs, full), 1e-6)  # float32
    runs, identities = wandb_scalars(logs)
    holds(runs[f"run/{full}"], 1e-12)
    [(identity, group)] = identities[f"run/{full}"]
    assert group == "run"
    assert json.loads((ended.run / full / "tracker.json").read_text()) == {"id": identity}
    kept = trackio_scalars(ended.run.parent / "trackio", "everything")
    holds(kept[f"run-iteration-1-{stage}-{identity}"], 1e-12)


def test_the_hub_has_every_data_set_and_every_model(ended):
    kinds = {name.removeprefix("model/org/mine-iteration-1-") for name in ended.hub}
    kinds = {name.removeprefix("dataset/org/mine-iteration-1-") for name in kinds}
    assert {
        "generate",
        "influence",
        "synthesise-untuned",
        "synthesise-tuned",
        "dpo-teacher",
        "train-untuned-student",
        "train-tuned-student",
    } <= kinds
    teacher = ended.hub["model/org/mine-iteration-1-dpo-teacher"]["files"]
    weights = ended.run / "iteration-1/dpo/teacher/model.safetensors"
    assert teacher["model.safetensors"] == weights.read_bytes()
