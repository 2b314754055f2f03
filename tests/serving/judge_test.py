"""A judge behind a real address: what is judged is kept, whatever happens to server or asker."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from montessori_jax.config import HeadToHeadConfig, JudgeConfig, Price
from montessori_jax.costs import Meter
from montessori_jax.errors import UserError
from montessori_jax.evaluation.contestants import distinct
from montessori_jax.serving.judge import Judge, Question, read
from montessori_jax.serving.requests import Garbled
from montessori_jax.serving.sidecar import MODEL
from montessori_jax.stages.head_to_head import head_to_head
from montessori_jax.work import Work

ROOT = Path(__file__).parents[2]
PROMPTS = 3


@pytest.fixture
def judging(served, proxy, monkeypatch) -> JudgeConfig:
    monkeypatch.setenv("TEST_KEY", served.generator.server.key)
    prices = {MODEL: Price(prompt=2.0, generated=8.0)}
    return JudgeConfig(f"{proxy.url}/v1", MODEL, "TEST_KEY", 1, retries=3, prices=prices)


@pytest.fixture
def answers(tmp_path: Path) -> list[str]:
    """Three files of answers; two of them agree on the first prompt."""
    files = []
    for name, first in (("a", "same"), ("b", "same"), ("c", "other")):
        rows = [
            {
                "instruction": f"Name {count} rivers.",
                "output": f"{name} {count}" if count else first,
            }
            for count in range(PROMPTS)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        files.append(f"{name}={tmp_path / name}.jsonl")
    return files


def work_in(folder: Path) -> Work:
    return Work(folder, 0, Meter(None, "head-to-head"), say=lambda text: None, quiet=True)


def question(text: str, **options) -> Question:
    return Question(({"role": "user", "content": text},), {"max_tokens": 4, **options})


def test_judgements_are_kept_counted_and_asked_once(proxy, judging, tmp_path):
    judge = Judge.of(judging)
    proxy.faults = ["429", "500", "html"]
    asked = [question("a", temperature=0.0), question("b"), question("a", temperature=0.0)]
    work = work_in(tmp_path)
    found = judge.ask(asked, work.file("j.jsonl"), work, label="judge")
    assert len(found) == 2  # equal questions are one
    assert len(proxy.asked) == 3 + 2
    assert proxy.asked[0] == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 4,
        "temperature": 0.0,
    }
    counts = work.meter.counts
    paid = (2 * counts["judge_prompt_tokens"] + 8 * counts["judge_generated_tokens"]) / 1e6
    assert work.meter.dollars == pytest.approx(paid)
    cost = judge.cost(list(found.values()))
    assert cost["dollars"] == pytest.approx(paid, abs=1e-6)
    assert (cost["judgements"], cost["generated_tokens"]) == (2, counts["judge_generated_tokens"])
    # Again, and one more: only that one is asked and paid.
    work = work_in(tmp_path)
    again = judge.ask([*asked, question("c")], work.file("j.jsonl"), work, label="judge")
    assert len(proxy.asked) == 6
    assert {name: again[name] for name in found} == found
    # Another judge's journal is not taken for this one's.
    other = Judge(replace(judging, model="other"), judge.key)
    with pytest.raises(UserError, match=r"j\.jsonl holds work done with other settings \(judge: "):
        other.ask(asked, work.file("j.jsonl"), work, label="judge")


def test_logprobs_come_with_the_judgement(judging, tmp_path):
    work = work_in(tmp_path)
    one = question("a", temperature=1.0, logprobs=True, top_logprobs=5)
    found = Judge.of(judging).ask([one], work.file("j.jsonl"), work, label="judge")[one.id]
    assert found.logprobs is not None
    first = found.logprobs["content"][0]
    assert len(first["top_logprobs"]) >= 5
    assert set(first["top_logprobs"][0]) == {"token", "logprob"}


def test_an_address_that_is_gone_is_one_line_and_keeps_what_it_said(proxy, judging, tmp_path):
    judge = Judge.of(replace(judging, retries=0))
    proxy.faults, proxy.always = ["", "drop"], "drop"
    work = work_in(tmp_path)
    with pytest.raises(UserError, match=r"does not answer .*what was judged is kept"):
        judge.ask([question("a"), question("b")], work.file("j.jsonl"), work, label="judge")
    assert len(work.file("j.jsonl").read_text().splitlines()) == 1 + 1
    with pytest.raises(UserError, match=r"set judge\.base_url"):
        Judge.of(JudgeConfig())


def test_a_tools_arguments_are_the_text_and_half_an_answer_is_garbled():
    choice = {"message": {"tool_calls": [{"function": {"arguments": "{}"}}]}, "finish_reason": "x"}
    assert read({"choices": [choice]}, "q").text == "{}"
    for broken in ({}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}):
        with pytest.raises(Garbled):
            read(broken, "q")


def test_a_comparison_that_is_killed_goes_on_without_asking_twice(
    proxy, judging, answers, served, tmp_path
):
    # Of 3 pairs x 3 prompts one has equal answers, and two compare the same texts: 7 comparisons,
    # each in both orders.
    whole = 14
    prompts = tmp_path / "a.jsonl"
    out = tmp_path / "out"
    proxy.faults = [""] * 5 + ["hang"]
    command = [
        sys.executable, "-m", "montessori_jax.cli", "head-to-head", "--quiet",
        "--contestants", *answers, "--prompts", str(prompts), "--out", str(out),
        "--judge-base-url", judging.base_url, "--judge-model", MODEL,
        "--judge-api-key-env", "TEST_KEY", "--judge-concurrency", "1", "--judge-tokens", "4",
    ]  # fmt: skip
    running = subprocess.Popen(command, cwd=ROOT, env=os.environ, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while len(proxy.asked) < 6 and time.monotonic() < deadline:
            assert running.poll() is None
            time.sleep(0.1)
        # The fifth answer is on disk before the sixth question is asked.
        os.killpg(running.pid, signal.SIGKILL)
    finally:
        running.kill()
        running.wait()
    assert len((out / "judgements.jsonl").read_text().splitlines()) == 1 + 5
    settings = HeadToHeadConfig(prompts=str(prompts), judge_tokens=4)
    result = head_to_head(distinct(answers), settings, judging, work_in(out))
    assert len(proxy.asked) == 6 + (whole - 5)
    assert result["cost"]["judgements"] == whole
    assert result["contestants"] == ["a", "b", "c"]
    # The tiny model has no verdicts; the equal answers are a tie all the same.
    first, *others = result["pairs"]
    assert (first["identical"], first["ties"], first["unparseable"]) == (1, 1, PROMPTS - 1)
    assert [one["unparseable"] for one in others] == [PROMPTS, PROMPTS]
    assert result["win_rate"] == [[None, 50.0, None], [50.0, None, None], [None] * 3]
    assert json.loads((out / "head_to_head.json").read_text()) == result
    table = (out / "head_to_head.md").read_text()
    assert "| a |  | 50.0 |  |" in table
    # Once more: nothing is asked.
    head_to_head(distinct(answers), settings, judging, work_in(out))
    assert len(proxy.asked) == 6 + (whole - 5)
    with pytest.raises(UserError, match="compares two or more"):
        head_to_head(distinct(answers[:1]), settings, judging, work_in(out))
