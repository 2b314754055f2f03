"""Which parts of a stage are traced, and that a trace is there for each stage."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from montessori_jax.cli import run
from montessori_jax.profiling import Profile
from tests.tiny_world import write_tiny_teacher


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the profiler was told, and the parts done between."""
    events: list[Any] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (7, [1, 2, "start", 3, 4, 5, "stop", 6, 7]),
        (4, [1, 2, "start", 3, 4, "stop"]),
        (3, [1, 2, "start", 3, "stop"]),
        (2, [1, "start", 2, "stop"]),
        (1, ["start", 1, "stop"]),
        (0, []),
    ],
)
def test_steps_three_to_five_are_traced(traced: list[Any], parts: int, expected: Any) -> None:
    with Profile(Path("traces"), 3, 5) as profile:
        profile.begin(parts)
        for part in range(parts):
            traced.append(part + 1)
            profile.passed()
    assert traced == expected


def test_a_resumed_stage_is_traced_from_where_it_goes_on(traced: list[Any]) -> None:
    reached: list[tuple[int, int]] = []
    with Profile(Path("traces"), 3, 5) as profile:
        reach = profile.along(lambda *done: reached.append(done))
        for done in range(90, 101):
            traced.append(done)
            reach(done, 100)
    assert traced[traced.index("start") - 1] == 92  # two steps done: the third is next
    assert traced[traced.index("stop") - 1] == 95
    assert reached == [(done, 100) for done in range(90, 101)]


def test_nothing_is_traced_unasked_and_a_failure_ends_the_trace(traced: list[Any]) -> None:
    with Profile(None, 1, 1) as profile:
        profile.begin(1)
        profile.passed()
    assert traced == []

    def fail() -> None:
        with Profile(Path("traces"), 1, 2) as profile:
            profile.begin(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert traced == ["start", "stop"]


def test_every_stage_that_computes_leaves_a_trace(tmp_path: Path) -> None:
    teacher = str(write_tiny_teacher(tmp_path / "teacher", prompts=4))
    rows = [{"instruction": f"Count to {n}.", "response": f"one {n}"} for n in range(6)]
    texts = "".join(json.dumps(row) + "\n" for row in rows)
    pairs = [{"prompt": f"Count {n}", "chosen": "one", "rejected": "two two"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text(texts)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data, small = str(tmp_path / "rows.jsonl"), ("--max-length", "64", "--quiet")
    stages = {
        "sft": ("--student", teacher, "--data", data, "--batch-size", "2",
                "--out", str(tmp_path / "sft")),
        "dpo": ("--teacher", teacher, "--pairs", str(tmp_path / "pairs.jsonl"),
                "--batch-size", "1", "--out", str(tmp_path / "dpo")),
        "influence": ("--student", teacher, "--candidates", data, "--reference", data,
                      "--optimizer", "sgd", "--learning-rate", "1e-2", "--method", "exact",
                      "--chunk", "2", "--out", str(tmp_path / "scores.jsonl")),
        "evaluate": ("--student", teacher, "--heldout", data),
    }  # fmt: skip
    for stage, flags in stages.items():
        assert run([stage, *flags, *small, "--profile", str(tmp_path / "traces")]) == 0
        (trace,) = (tmp_path / "traces" / stage).rglob("*.xplane.pb")
        assert trace.stat().st_size > 1000
