"""Methods whose teacher or judge is a model behind an address: a real server, whole runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from montessori_jax.config import UrlConfig, as_dict
from montessori_jax.costs import read_ledger
from montessori_jax.data.tables import read_table
from montessori_jax.generation.teacher import Teacher
from montessori_jax.serving.environment import Environment
from montessori_jax.serving.sidecar import MODEL
from tests.end_to_end.resume_test import CONFIG
from tests.methods.small import go, settings, stages
from tests.serving.conftest import serve
from tests.tiny_world import write_tiny_teacher

# One example, as the teacher was shown in training.
GENERATION = {**CONFIG["generation"], "style": "chat", "generated_exemplars": 0, "max_tokens": 64}

# A teacher of its own, which takes a minute to train; chat_test has the parts.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher that writes when it is asked in a chat, and judges."""
    place = tmp_path_factory.mktemp("chat") / "teacher"
    return write_tiny_teacher(place, head_dim=32, other_tasks=128, style="chat")


@pytest.fixture(scope="module")
def behind(
    vllm: Environment, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Teacher]:
    """The same teacher behind a vLLM."""
    yield from serve(str(folder), tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def address(behind: Teacher, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    server = behind.generator.server
    monkeypatch.setenv("TEST_KEY", server.key)
    prices = {MODEL: {"prompt": 2.0, "generated": 8.0}}
    url = UrlConfig(f"{server.url}/v1", MODEL, "TEST_KEY", retries=2, prices=prices)
    return {**as_dict(url), "seeds": False}


def test_self_instruct_by_a_teacher_behind_an_address(address, folder, tmp_path):
    place = tmp_path / "run"
    changed = {"method": "self_instruct", "generator": "url", "url": address}
    go(settings(folder, place, **changed, generation=GENERATION))
    done = stages(place)
    assert done["synthesise-untuned"]["kept"] > 0
    assert done["train-untuned"]["rows"] > 0
    assert done["evaluate-untuned"]["reference_loss"]["loss"] > 0
    ledger = {row["stage"].split("/")[-1]: row for row in read_ledger(place / "costs.jsonl")}
    row = ledger["synthesise-untuned"]
    paid = (2.0 * row["prompt_tokens"] + 8.0 * row["generated_tokens"]) / 1e6
    assert row["dollars"] == pytest.approx(paid, abs=1e-6)
    assert row["dollars"] > 0


def test_self_reward_by_a_judge_behind_an_address(address, folder, tmp_path):
    place = tmp_path / "run"
    judging = {"samples": 4, "temperature": 0.7, "max_tokens": 12}
    changed = {"method": "self_reward", "iterations": 1, "judge": address, "judging": judging}
    go(settings(folder, place, **changed, generation=GENERATION))
    done = stages(place)
    assert done["judge"]["judge"] == MODEL
    assert done["judge"]["scored"] > 0
    scores = {
        row["id"]: row["score"]
        for row in read_table(str(place / "iteration-1/judge/scores.parquet"), ("id", "score"))
    }
    pairs = read_table(
        str(place / "iteration-1/preferences/pairs"), ("chosen_score", "rejected_score")
    )
    assert len(pairs) > 0
    for pair in pairs:
        assert pair["chosen_score"] > pair["rejected_score"]
        assert {pair["chosen_score"], pair["rejected_score"]} <= set(scores.values())
    assert done["dpo"]["steps"] > 0
    assert done["train-tuned"]["rows"] > 0
