"""One whole `montessori run` whose teachers write by a real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from montessori_jax.costs import read_ledger
from tests.end_to_end.resume_test import CONFIG, ROOT

VLLM = {"eager": True, "kv_cache_gib": 1, "max_num_seqs": 16}
TRAINING = ("warmup", "influence", "dpo", "train-untuned", "train-tuned")


def run(folder: Path, teacher: Path, *overrides: str) -> str:
    settings = {**CONFIG, "generator": "vllm", "vllm": VLLM, "teacher": str(teacher),
                "student": str(teacher)}  # fmt: skip
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", "montessori_jax.cli", "run", config, *overrides],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ended(vllm, tiny_folder, tmp_path_factory) -> tuple[Path, str]:
    """A run with LoRA whose training stages have processes of their own, as on one GPU."""
    folder = tmp_path_factory.mktemp("loop")
    place = folder / "run"
    return place, run(folder, tiny_folder, f"run_dir={place}", "stage_processes=always")


def test_every_stage_ran_and_the_tuned_teacher_came_as_an_adapter(ended):
    place, output = ended
    stages = place / "iteration-1"
    done = {path.parent.name for path in stages.glob("*/done.json")}
    assert {*TRAINING, "generate", "synthesise-untuned", "synthesise-tuned"} <= done
    for name in ("generate", "synthesise-untuned", "synthesise-tuned"):
        result = json.loads((stages / name / "done.json").read_text())
        assert (result["generator"], result["dtypes"]["responses"]) == ("vllm", "float32")
        assert result["seeded"] is False, "seeds kill vLLM's CPU server"
    assert output.count("starting vLLM") == 1
    assert "dpo/teacher (adapter)" in output
    assert "tokens: vLLM is" in output
    assert len(list((place / "vllm").glob("server-*.log"))) == 1
    assert json.loads((place / "summary.json").read_text())


def test_the_ledger_has_tokens_and_their_rate(ended):
    place, _ = ended
    rows = {row["stage"]: row for row in read_ledger(place / "costs.jsonl")}
    for name in ("generate", "synthesise-untuned", "synthesise-tuned"):
        row = rows[f"iteration-1/{name}"]
        assert row["prompt_tokens"] > 0
        rate = row["generated_tokens"] / row["seconds"]
        assert row["generated_tokens_per_second"] == pytest.approx(rate, rel=0.01)
    assert {f"iteration-1/{name}" for name in TRAINING} <= set(rows)


def test_the_same_command_starts_no_server_for_what_is_done(ended, tiny_folder):
    place, _ = ended
    output = run(place.parent, tiny_folder, f"run_dir={place}", "stage_processes=always")
    assert "starting vLLM" not in output
    assert output.count("done before") >= 12
