"""Questions that a judge refuses: one alone is counted, the first says that all would be."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from montessori_jax.config import JudgeConfig
from montessori_jax.costs import Meter
from montessori_jax.errors import UserError
from montessori_jax.serving.judge import REFUSED, Judge, Question
from montessori_jax.serving.requests import Refused
from montessori_jax.work import Work
from tests.serving.proxy import Proxy


class Answers(Proxy):
    """An address that answers what its faults do not; behind it is no server."""

    def pass_on(self, handler: BaseHTTPRequestHandler, body: bytes, short: bool = False) -> None:
        choice = {"message": {"content": "[[A]]"}, "finish_reason": "stop"}
        self.answer(handler, 200, json.dumps({"choices": [choice]}).encode())


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Answers(lambda: "http://127.0.0.1:9")
    yield made
    made.close()


def asking(proxy: Proxy, folder: Path) -> tuple[Callable, list[str]]:
    said: list[str] = []
    work = Work(folder, 0, Meter(None, "judge"), say=said.append, quiet=True)
    judge = Judge(JudgeConfig(f"{proxy.url}/v1", "m", concurrency=1, retries=0), "")

    def ask(*texts: str):
        questions = [
            Question(({"role": "user", "content": text},), {"max_tokens": 4}) for text in texts
        ]
        found = judge.ask(questions, work.file("j.jsonl"), work, label="judge")
        return [found[one.id] for one in questions], judge.cost(list(found.values()))

    return ask, said


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_later_refusal_is_an_empty_judgement_that_is_kept(status, proxy, tmp_path):
    ask, said = asking(proxy, tmp_path)
    proxy.faults = ["", status]
    found, cost = ask("a", "b", "c")
    assert [one.text for one in found] == ["[[A]]", "", "[[A]]"]
    assert found[1].finish == REFUSED
    assert cost["refused"] == 1
    assert f"1 refused, not to be parsed, such as: {proxy.url}" in said[0]
    # It is not asked again; and after an answer even the first of a call may be refused.
    proxy.faults = [status]
    again, _ = asking(proxy, tmp_path)[0]("b", "d")
    assert [one.finish for one in again] == [REFUSED, REFUSED]
    assert len(proxy.asked) == 3 + 1


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (["400"], r"refused the request with 400: later, please: set judge\.model and"),
        (["", "401"], "with 401: later, please: set OPENAI_API_KEY to a key that may use m"),
        (["403"], "set OPENAI_API_KEY to a key that may use m"),
        (["", "404"], r"set judge\.base_url .with its /v1. and judge\.model"),
    ],
)
def test_what_every_question_would_meet_ends_it_in_one_line(faults, words, proxy, tmp_path):
    ask, _ = asking(proxy, tmp_path)
    proxy.faults = list(faults)
    with pytest.raises(Refused, match=words) as error:
        ask("a", "b")
    assert isinstance(error.value, UserError)
    assert len(proxy.asked) == len(faults)
    # What was not answered is asked again.
    assert [one.text for one in ask("a", "b")[0]] == ["[[A]]", "[[A]]"]
