"""Stages of the methods, stopped on request and gone on with: they end as if they never were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from montessori_jax.config import BootstrapConfig, EvaluationConfig
from montessori_jax.costs import Meter
from montessori_jax.data.writing import write_jsonl
from montessori_jax.errors import Interrupted
from montessori_jax.models.folder import load_folder
from montessori_jax.stages import losses as losses_stage
from montessori_jax.stages.bootstrap import bootstrap
from montessori_jax.stages.losses import losses
from montessori_jax.stopping import Stop
from montessori_jax.work import CHECKPOINTS, Work
from tests.end_to_end.artifacts import artifacts
from tests.evaluation.tiny_student import tiny_student
from tests.methods.small import StopAfter

ROWS = 6


def stopped_and_resumed(
    place: Path, body: Callable[[Work], dict[str, Any]], written: str, lines: int, counted: str
) -> None:
    """Run ``body`` undisturbed, and stopped after so many lines of the file ``written``.

    Both end the same, and what is ``counted`` is done once.
    """
    counts: list[float] = []

    def go(name: str, stop: Stop) -> dict[str, Any]:
        meter = Meter(None, "stage")
        try:
            return body(Work(place / name, 0, meter, stop, lambda text: None, quiet=True))
        finally:
            counts.append(meter.counts[counted])

    for name in ("whole", "stopped"):
        (place / name).mkdir()
    expected = go("whole", Stop())
    with pytest.raises(Interrupted):
        go("stopped", StopAfter(place / "stopped" / written, lines))
    journal, ended = (place / name / written for name in ("stopped", "whole"))
    assert journal.read_bytes().count(b"\n") == lines < ended.read_bytes().count(b"\n")
    assert go("stopped", Stop()) == expected
    assert artifacts(place / "stopped") == artifacts(place / "whole")
    whole, before, after = counts
    assert min(before, after) > 0
    assert before + after == whole


def test_losses_go_on_with_the_next_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses_stage, "CHUNK", 2)
    rows = [{"instruction": f"Say {n}.", "response": "so " * (n + 1)} for n in range(ROWS)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    student = tiny_student(tmp_path / "student")
    settings = EvaluationConfig(max_length=64, rows_per_pass=2)

    def body(work: Work) -> dict[str, Any]:
        return losses(
            student, str(tmp_path / "rows.jsonl"), settings, work, fingerprint=student.fingerprint
        )

    # The journal's key and one chunk of three; the other two are measured after it.
    stopped_and_resumed(tmp_path, body, "losses.jsonl", 2, "scored_tokens")


def test_bootstrap_goes_on_with_the_next_step(tmp_path: Path):
    texts = [
        {"prompt_id": str(n), "prompt": f"Ask {n}.", "prefill": "", "answer": f"Name {n} rivers."}
        for n in range(ROWS)
    ]
    write_jsonl(tmp_path / "texts.jsonl", texts)
    tiny_student(tmp_path / "teacher")
    settings = BootstrapConfig(
        learning_rate=1e-3, batch_size=1, micro_batch=1, max_length=64, remat="none",
        checkpoint_every=ROWS + 1,
    )  # fmt: skip

    def body(work: Work) -> dict[str, Any]:
        teacher = load_folder(tmp_path / "teacher")  # whose parameters are used up
        return bootstrap(teacher, str(tmp_path / "texts.jsonl"), settings, work)

    stopped_and_resumed(tmp_path, body, "metrics.jsonl", 2, "trained_tokens")
    assert not (tmp_path / "stopped" / CHECKPOINTS).exists()
