"""The back-end for any OpenAI-compatible address, asked of a real one: vLLM's chat endpoint."""

import json
from dataclasses import replace

import pytest

from montessori_jax.config import (
    FilterConfig,
    GenerationConfig,
    Price,
    ResponseConfig,
    RunConfig,
    SamplingConfig,
    UrlConfig,
    as_dict,
)
from montessori_jax.config_file import build
from montessori_jax.costs import Meter, read_ledger
from montessori_jax.data.tables import read_table
from montessori_jax.errors import UserError
from montessori_jax.generation.generator import PromptRequest
from montessori_jax.generation.prompts import build_instruction_prompt, build_response_prompt
from montessori_jax.pipeline import run
from montessori_jax.serving.sidecar import MODEL
from montessori_jax.serving.teachers import UrlTeachers
from montessori_jax.stages.generate import generate
from montessori_jax.stages.sample import as_request
from montessori_jax.stopping import Stop
from montessori_jax.work import Work
from tests.end_to_end.resume_test import CONFIG
from tests.methods.small import SMALL
from tests.serving.proxy import Proxy


@pytest.fixture
def url(served, monkeypatch) -> UrlConfig:
    server = served.generator.server
    monkeypatch.setenv("TEST_KEY", server.key)
    prices = {MODEL: Price(prompt=2.0, generated=8.0)}
    return UrlConfig(f"{server.url}/v1", MODEL, "TEST_KEY", retries=2, prices=prices)


def test_greedy_chat_is_what_the_same_server_completes(url, served):
    chat = UrlTeachers(url).teacher("unused")
    settings = SamplingConfig(temperature=0.0, max_tokens=16)
    prompts = [build_response_prompt(f"Name {count} rivers.") for count in ("two", "six")]
    for samples, name in ((1, "greedy"), (3, "drawn")):
        drawn = settings if samples == 1 else replace(settings, temperature=1.0, top_k=50)
        asked = [as_request(chat, str(i), one, i) for i, one in enumerate(prompts)]
        found = {
            made[0].prompt_id: made
            for made in chat.generator.generate(asked, drawn, samples=samples, seed=0)
        }
        assert sorted(found) == ["0", "1"], name
        for index, prompt in enumerate(prompts):
            request = as_request(served, str(index), prompt, index)
            made = found[str(index)]
            assert [one.index for one in made] == list(range(samples))
            assert sum(one.prompt_tokens for one in made) == len(request.tokens)
            assert 0 < sum(one.generated_tokens for one in made) <= 16 * samples
            if samples == 1:
                ((theirs,),) = served.generator.generate([request], drawn, samples=1, seed=0)
                assert (made[0].text, made[0].finish) == (theirs.text, theirs.finish)


def test_a_stop_string_is_cut_out_of_the_finished_text(url):
    generator = UrlTeachers(url).teacher("unused").generator
    request = PromptRequest("p", (), 0, ({"role": "user", "content": "x"},))
    answer = {
        "choices": [{"index": 0, "message": {"content": "so <i>do it</i> now"}, "finish_reason":
                     "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5},
    }  # fmt: skip
    (one,) = generator.read(answer, request, 1, ("zz", "</i>"))
    assert (one.text, one.stop, one.finish) == ("so <i>do it", "</i>", "stop")
    (one,) = generator.read(answer, request, 1, ())
    assert (one.text, one.stop, one.finish) == ("so <i>do it</i> now", "", "end")


def test_a_server_that_gives_fewer_texts_is_not_paid_again(url, served):
    proxy = Proxy(lambda: served.generator.server.url)
    proxy.always = "short"
    try:
        generator = UrlTeachers(replace(url, base_url=f"{proxy.url}/v1")).teacher("x").generator
        request = PromptRequest("p", (), 0, ({"role": "user", "content": "x"},))
        with pytest.raises(UserError, match=r"gave 1 texts where 2 were asked for"):
            list(generator.generate([request], SamplingConfig(max_tokens=4), samples=2, seed=0))
        assert len(proxy.asked) == 1
    finally:
        proxy.close()


def test_prompts_that_chat_cannot_say_are_refused(url):
    teacher = UrlTeachers(url).teacher("unused")
    for style in ("turns", "list"):
        request = as_request(teacher, "p", build_instruction_prompt(style, ["Do it."]), 0)
        with pytest.raises(UserError, match=r"set generation\.style to chat"):
            list(teacher.generator.generate([request], SamplingConfig(), samples=1, seed=0))


def test_a_refused_key_and_a_dead_address_are_one_line(url, monkeypatch):
    request = PromptRequest("p", (), 0, ({"role": "user", "content": "x"},))
    monkeypatch.setenv("TEST_KEY", "wrong")
    generator = UrlTeachers(url).teacher("unused").generator
    with pytest.raises(UserError, match="refused the request with 401"):
        list(generator.generate([request], SamplingConfig(), samples=1, seed=0))
    dead = replace(url, base_url="http://127.0.0.1:9/v1", retries=1)
    generator = UrlTeachers(dead).teacher("unused").generator
    with pytest.raises(UserError, match=r"does not answer .after 2 attempts: ConnectError"):
        list(generator.generate([request], SamplingConfig(), samples=1, seed=0))
    with pytest.raises(UserError, match="needs a key: set NO_SUCH_KEY"):
        UrlTeachers(UrlConfig(api_key_env="NO_SUCH_KEY")).teacher("unused")


def test_a_stage_counts_tokens_and_money_and_goes_on_where_it_stopped(url, served, tmp_path):
    proxy = Proxy(lambda: served.generator.server.url)
    proxy.faults = ["", "", "429", "500", "html", "", ""]
    ledger = tmp_path / "costs.jsonl"
    teacher = UrlTeachers(replace(url, base_url=f"{proxy.url}/v1", retries=5)).teacher("unused")
    settings = GenerationConfig(
        style="chat", samples=2, round_prompts=8, seed_exemplars=1, generated_exemplars=0,
        max_tokens=24, min_yield=0.0,
        filters=FilterConfig(min_words=0, max_words=1000, keywords=(), rouge_threshold=1.0,
                             allow_punctuation_start=True, allow_non_ascii_start=True),
    )  # fmt: skip
    responses = ResponseConfig(max_tokens=8, unfinished="keep")

    def once(name: str) -> dict:
        meter = Meter(ledger, "generate")
        work = Work(tmp_path / name, 0, meter, say=lambda text: None, quiet=True)
        try:
            return generate(teacher, "package:seeds", settings, responses, work, prompts=4)
        finally:
            meter.close(True)

    try:
        # The tiny teacher does not follow the chat style: what counts is what was asked for.
        with pytest.raises(UserError, match="no instruction was kept of 8"):
            once("run")
        (row,) = read_ledger(ledger)
        lines = (tmp_path / "run" / "instructions.jsonl").read_text().splitlines()
        journal = [json.loads(line) for line in lines[1:]]
        assert sorted(one["completions"][0]["prompt_id"] for one in journal) == [
            f"p{i:05d}" for i in range(4)
        ]
        assert len(proxy.asked) == 4 + 3
        paid = (2.0 * row["prompt_tokens"] + 8.0 * row["generated_tokens"]) / 1e6
        assert row["dollars"] == pytest.approx(paid, abs=1e-6)
        assert row["generated_tokens"] == sum(
            one["tokens"] for line in journal for one in line["completions"]
        )
        assert row["generated_tokens_per_second"] > 0
        # Again: everything is there, so nothing is asked or paid.
        with pytest.raises(UserError, match="no instruction was kept of 8"):
            once("run")
        assert len(proxy.asked) == 7
        assert read_ledger(ledger)[0]["dollars"] == row["dollars"]
    finally:
        proxy.close()


def test_a_judge_behind_an_address_is_asked_once_and_paid_once(url, served, tiny_folder, tmp_path):
    """Self-Reward up to its judge, a real server, which is too small a model to give a score."""
    proxy = Proxy(lambda: served.generator.server.url)
    proxy.faults = ["", "500", "", "429"]
    judge = {**as_dict(url), "base_url": f"{proxy.url}/v1", "retries": 5, "seeds": False}
    place = tmp_path / "run"
    values = {
        **CONFIG, **SMALL, "method": "self_reward", "iterations": 1, "judge": judge,
        "teacher": str(tiny_folder), "student": str(tiny_folder), "run_dir": str(place),
    }  # fmt: skip
    config = build(RunConfig, values, "test")
    try:
        with pytest.raises(UserError, match=f"judgements of {MODEL} ends with 'Score: N'"):
            run(config, say=lambda text: None, stop=Stop(), quiet=True)
        [responses] = (place / "iteration-1" / "respond").glob("*.parquet")
        rows = len(read_table(str(responses)))
        assert len(proxy.asked) == rows + 2  # a request for both judgements, two faults
        assert not any("seed" in one for one in proxy.asked)
        [row] = [one for one in read_ledger(place / "costs.jsonl") if "/judge" in one["stage"]]
        paid = (2.0 * row["prompt_tokens"] + 8.0 * row["generated_tokens"]) / 1e6
        assert row["dollars"] == pytest.approx(paid, abs=1e-6)
        assert row["dollars"] > 0
        # What was judged is not asked, or paid, again.
        with pytest.raises(UserError, match="too small a judge"):
            run(config, say=lambda text: None, stop=Stop(), quiet=True)
        assert len(proxy.asked) == rows + 2
    finally:
        proxy.close()
