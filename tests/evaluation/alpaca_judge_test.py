"""AlpacaEval whole, with a judge behind a real address that gives no log-probs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from montessori_jax.config import AlpacaEvalConfig, AnswerConfig, EvaluationConfig, JudgeConfig
from montessori_jax.costs import Meter
from montessori_jax.errors import UserError
from montessori_jax.evaluation.alpaca_eval import alpaca_eval
from montessori_jax.evaluation.alpaca_library import DEFAULT, WITHOUT_LOGPROBS
from montessori_jax.evaluation.context import Context
from montessori_jax.work import Work
from tests.evaluation.judge_server import JudgeServer
from tests.evaluation.tiny_student import tiny_student

COUNT = 3
MARK = "the baseline's"


def student_is_better(content: str) -> str:
    """A written ranking as the library's annotator asks for one."""
    first = content.split('"model_2"')[0].rfind(MARK) >= 0
    ranks = (2, 1) if first else (1, 2)
    return (
        f"[{{'model': 'model_1', 'rank': {ranks[0]}}}, {{'model': 'model_2', 'rank': {ranks[1]}}}]"
    )


@pytest.fixture(params=[(), ("logprobs",)], ids=["gives none", "refuses them"])
def judge(request: pytest.FixtureRequest) -> Iterator[JudgeServer]:
    made = JudgeServer(student_is_better, refuses=request.param)
    yield made
    made.close()


def test_a_judge_without_logprobs_is_asked_for_a_ranking(judge: JudgeServer, tmp_path: Path):
    rows = [{"instruction": f"Name {n} rivers.", "output": f"{MARK} {n}"} for n in range(COUNT)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    student, said = tiny_student(tmp_path / "student"), list[str]()

    def evaluated(annotator: str = "auto"):
        settings = EvaluationConfig(
            evaluations=("alpaca_eval",),
            alpaca_eval=AlpacaEvalConfig(
                prompts=str(tmp_path / "prompts.json"),
                baseline="outputs",
                annotator=annotator,
                answers=AnswerConfig(max_tokens=8, prompts_per_batch=COUNT),
            ),
        )
        work = Work(tmp_path / "out", 0, Meter(None, "evaluate"), say=said.append, quiet=True)
        judging = JudgeConfig(base_url=judge.url, model="m", api_key_env="", retries=0)
        return alpaca_eval(Context(student, settings, work, "", judge=judging))

    found = evaluated()
    assert found["annotator"] == WITHOUT_LOGPROBS
    assert (found["win_rate"], found["wins"], found["unparseable"]) == (100.0, COUNT, 0)
    (line,) = [one for one in said if "log-probs" in one]
    assert line.endswith(f"it is asked by {WITHOUT_LOGPROBS} instead of {DEFAULT}")
    # One question with log-probs, before the others are paid for; the rest without.
    assert ["logprobs" in body for body in judge.asked] == [True] + [False] * COUNT
    # The result says so however often it is made, and no ranking is asked for again.
    asked = len(judge.asked)
    assert {**evaluated(), "cost": None} == {**found, "cost": None}
    assert not [body for body in judge.asked[asked:] if "logprobs" not in body]
    with pytest.raises(UserError, match=f"alpaca_eval.annotator: {WITHOUT_LOGPROBS}"):
        evaluated(DEFAULT)
