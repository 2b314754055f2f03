"""The whole loop from the command line: killed in every stage, it ends as if it never was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from montessori_jax.mirror import MANIFEST, OWN
from montessori_jax.training.state_folder import CONTENT
from montessori_jax.work import CHECKPOINTS
from tests.end_to_end.artifacts import artifacts, assert_same_runs, assert_same_students
from tests.tiny_world import write_tiny_teacher

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "iterations": 1,
    "warmup_fraction": 0.3,
    "synthesis_prompts": 4,
    "data": {"num_reference": 6, "num_heldout": 8},
    "generation": {
        "style": "turns",
        "prompts": 8,
        "samples": 3,
        "round_prompts": 4,
        "seed_exemplars": 1,
        "generated_exemplars": 1,
        "max_tokens": 32,
        "prompts_per_batch": 2,
        "min_yield": 0.05,
        "filters": {"min_words": 1, "rouge_threshold": 1.0, "keywords": []},
    },
    "responses": {"max_tokens": 24, "prompts_per_batch": 8, "unfinished": "keep"},
    "warmup": {"rows": 6, "learning_rate": 1e-3, "batch_size": 2, "max_length": 256},
    "influence": {"method": "first_order", "audit": 3, "max_length": 256, "chunk": 4},
    "preferences": {"rule": "extremes", "heldout_fraction": 0.2},
    "dpo": {
        "learning_rate": 1e-2,
        "warmup_ratio": 0,
        "batch_size": 1,
        "max_length": 512,
        "lora_rank": 4,
    },
    "sft": {"rows": 9, "learning_rate": 1e-3, "warmup_ratio": 0, "batch_size": 3},
}
for section in ("warmup", "dpo", "sft"):
    CONFIG[section] |= {"checkpoint_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained tiny teacher, a config that uses it, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("world")
    teacher = write_tiny_teacher(folder / "teacher")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "teacher": str(teacher), "student": str(teacher)}))
    return folder


def start(world: Path, run: str | Path, *overrides: str) -> subprocess.Popen:
    return launch(world, "run", world / "tiny.yaml", f"run_dir={run}", *overrides)


def launch(world: Path, *arguments: str | Path) -> subprocess.Popen:
    """The command line, with the world's cache of compiled programs."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(world / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "montessori_jax.cli", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(world: Path, run: str | Path, *overrides: str) -> str:
    process = start(world, run, *overrides)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def undisturbed(world):
    run = world / "undisturbed"
    return run, finish(world, run)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Where a kill strikes: as soon as this file of the run has so many lines (or is there).
STRIKES = {
    "generation": ("iteration-1/generate/instructions.jsonl", 3),
    "responses": ("iteration-1/generate/responses.jsonl", 2),
    "warm-up": ("iteration-1/warmup/metrics.jsonl", 1),
    "influence": ("iteration-1/influence/chunks.jsonl", 2),
    "dpo": ("iteration-1/dpo/metrics.jsonl", 2),
    "export": ("iteration-1/dpo/teacher/config.json", 1),
    "synthesis": ("iteration-1/synthesise-tuned/instructions.jsonl", 2),
    "training": ("iteration-1/train-tuned/metrics.jsonl", 1),
}


def strike(
    world: Path, folder: Path, place: str, kind: signal.Signals, run: tuple[str, ...] = ()
) -> int:
    """Start the run, kill it at the place, and return its exit status.

    ``run`` is what `start` takes, where that is not ``folder``.
    """
    name, count = STRIKES[place]
    process = start(world, *(run or (folder,)))
    deadline = time.monotonic() + 600
    while process.poll() is None and lines(folder / name) < count:
        assert time.monotonic() < deadline, place
        time.sleep(0.002)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0, f"{place}: ended before it was killed:\n{output}"
    return process.returncode


def test_a_run_ends_with_its_table_and_every_artifact(undisturbed):
    run, output = undisturbed
    for words in (
        "yield of the teacher",
        "preference pairs",
        "share of positive influence",
        "DPO loss",
        "held-out reward margin",
        "texts that differ under equal seeds",
        "(Self-Instruct)",
        "demonstrates the mechanics",
    ):
        assert words in output, words
    assert f"The page of figures and samples: {run / 'report.html'}" in output
    summary = json.loads((run / "summary.json").read_text())
    stages = summary["iterations"][0]["stages"]
    assert stages["influence"]["audit"]["agreement"]["count"] == 3
    assert stages["train-tuned"]["rows"] == stages["train-untuned"]["rows"]
    assert stages["similarity"]["changed_share"] > 0
    for name in (
        "dpo/teacher/model.safetensors",
        "dpo/adapter/adapter_model.safetensors",
        "generate/README.md",
        "influence/scores.parquet",
    ):
        assert (run / "iteration-1" / name).is_file(), name


def test_a_finished_run_is_not_run_again(world, undisturbed):
    run, _ = undisturbed
    before = artifacts(run)
    output = finish(world, run)
    assert output.count("done before") == len(list((run / "iteration-1").iterdir()))
    assert artifacts(run) == before


def test_killed_in_a_few_stages_it_ends_the_same(world, undisturbed, tmp_path):
    run = tmp_path / "killed"
    assert strike(world, run, "generation", signal.SIGKILL) == -signal.SIGKILL
    assert strike(world, run, "influence", signal.SIGTERM) == 128 + signal.SIGTERM
    assert strike(world, run, "dpo", signal.SIGKILL) == -signal.SIGKILL
    finish(world, run)
    assert_same_runs(undisturbed[0], run)


def test_sigterm_saves_the_step_at_hand_and_the_next_run_goes_on_from_it(world, tmp_path):
    """As a preemption does it: checkpoints are far apart, so only the signal makes one."""
    rows = "".join(
        json.dumps({"instruction": f"Count to {n}.", "response": "one " * (n % 7 + 1)}) + "\n"
        for n in range(60)
    )
    (tmp_path / "rows.jsonl").write_text(rows)

    def sft(out: str) -> subprocess.Popen:
        flags = "--batch-size 2 --micro-batch 1 --checkpoint-every 1000 --max-length 64"
        return launch(
            world, "sft", "--student", world / "teacher", "--data", tmp_path / "rows.jsonl",
            *flags.split(), "--learning-rate", "1e-3", "--out", tmp_path / out,
        )  # fmt: skip

    whole, _ = sft("whole").communicate(timeout=600)
    assert "30 steps" in whole
    process, metrics = sft("stopped"), tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and lines(metrics) < 4:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, output
    done = lines(metrics)
    assert 4 <= done < 30
    (saved,) = (tmp_path / "stopped" / CHECKPOINTS).iterdir()
    assert saved.name == str(done)
    assert (saved / CONTENT).is_file()
    output, _ = sft("stopped").communicate(timeout=600)
    assert f"going on from step {done} of 30" in output
    one, other = artifacts(tmp_path / "whole"), artifacts(tmp_path / "stopped")
    assert one == other


def test_killed_on_one_machine_it_goes_on_from_the_storage_on_another(world, undisturbed, tmp_path):
    """Machines share nothing but a store: each has a folder of its own."""
    store = f"file://{tmp_path}/store/run"

    def on_machine(number: int) -> tuple[str, ...]:
        return (store, f"local_dir={tmp_path / str(number)}")

    struck = strike(world, tmp_path / "1", "influence", signal.SIGKILL, run=on_machine(1))
    assert struck == -signal.SIGKILL
    struck = strike(world, tmp_path / "2", "dpo", signal.SIGTERM, run=on_machine(2))
    assert struck == 128 + signal.SIGTERM
    assert (tmp_path / "2" / "iteration-1" / "warmup" / "done.json").is_file()
    output = finish(world, *on_machine(3))
    assert "iteration-1/influence: done before" in output
    places = [tmp_path / str(number) for number in (1, 2, 3)]

    def made(run: Path) -> dict[str, bytes]:
        # What says where a run is differs.
        apart = ("config.yaml", OWN, MANIFEST)
        found = artifacts(run, *places)
        return {name: content for name, content in found.items() if name not in apart}

    assert made(tmp_path / "3") == made(undisturbed[0])
    assert made(tmp_path / "store" / "run") == made(undisturbed[0])
    assert_same_students(undisturbed[0], tmp_path / "3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=lambda kind: kind.name)
def test_killed_in_every_stage_it_ends_the_same(world, undisturbed, tmp_path, kind):
    run = tmp_path / "killed"
    for place in STRIKES:
        strike(world, run, place, kind)
    finish(world, run)
    assert_same_runs(undisturbed[0], run)


def test_other_settings_in_the_same_directory_are_refused(world, undisturbed):
    run, _ = undisturbed
    process = subprocess.run(
        [
            *(sys.executable, "-m", "montessori_jax.cli", "run", world / "tiny.yaml"),
            *(f"run_dir={run}", "dpo.beta=0.3"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "dpo.beta: 0.1 -> 0.3" in process.stderr
    assert process.stderr.count("\n") == 1
