"""The influence stage on files: odd rows, several reference sets, an interrupted run."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from montessori_jax.cli import run
from montessori_jax.config import InfluenceConfig
from montessori_jax.costs import Meter
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.stages import influence as stage
from montessori_jax.work import Work
from tests.meshes import mesh_on
from tests.models import tiny

# As reasoning models have it: what was thought is no part of the turn.
TEMPLATE = (
    "{% for m in messages %}{% set said = m['content'].split('</think>')[-1] %}"
    "{{ 'w4 ' if m['role'] == 'assistant' else 'w3 ' }}"
    "{% if said.strip() %}{{ said + ' w2 ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)
LONGEST = 24
NO_ROOM = "the prompt has 32 tokens, which leaves no room for a response below max_length 24"
# Rows and why each has no score; w60 has an embedding of NaN.
ODD = [
    ({"instruction": "w5 w6 w7", "response": "w8 w9 w10"}, None),
    ({"instruction": "w5", "response": "  "}, "response is empty"),
    (
        {"instruction": "w5 w7", "response": "w8 w9 </think> "},
        "the chat template of tiny leaves nothing of the response",
    ),
    ({"instruction": "w5 " * 29, "response": "w6"}, NO_ROOM),
    ({"instruction": "w5 w9", "response": "w6 " * 40}, None),
    ({"instruction": "w5 w11", "response": "w6 w60 w7"}, "the loss on the candidate is nan"),
    ("{not json", "the line is not valid JSON"),
    ({"instruction": "w12 w6 w7", "response": "w13 w9"}, None),
]
REFERENCE = [
    {"instruction": f"w{i + 20} w6 w{i + 7}", "response": f"w{i + 30} w9 w{i + 11}"}
    for i in range(4)
]


def write(path: Path, rows: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("students") / "tiny"
    model = tiny.torch_model({**tiny.CONFIG, "num_hidden_layers": 1})
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = torch.nan
    model.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def influence(student, candidates, references, out, *more) -> int:
    given = [part for one in references for part in ("--reference", one)]
    return run(
        [
            *("influence", "--student", student, "--candidates", candidates, *given),
            *("--out", str(out), "--method", "exact", "--optimizer", "sgd"),
            *("--learning-rate", "1e-2", "--max-length", str(LONGEST), "--quiet", *more),
        ]
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_odd_row_has_its_reason(student, tmp_path, capsys):
    candidates = write(tmp_path / "rows.jsonl", [row for row, _ in ODD])
    reference = write(tmp_path / "reference.jsonl", REFERENCE)
    out = tmp_path / "scores.jsonl"
    assert influence(student, candidates, [reference], out) == 0
    found = read(out)
    reasons = [row["reason"] and row["reason"].replace(student, "tiny") for row in found]
    assert reasons == [reason for _, reason in ODD]
    assert [row["influence"] is None for row in found] == [bool(reason) for _, reason in ODD]
    said = capsys.readouterr().out
    assert "3 scored, 1 cut at 24 tokens, 5 not" in said
    for reason in filter(None, reasons):
        assert said.replace(student, "tiny").count(f"'{reason}': 1") == 1


@pytest.mark.parametrize(
    ("rows", "reference", "words"),
    [
        (
            [{**row, "id": "twice"} for row, reason in ODD if not reason],
            REFERENCE,
            "has the id 'twice' in rows 1 and 2",
        ),
        (
            [ODD[0][0]],
            [ODD[1][0], ODD[1][0]],
            "has 0 usable rows of 2, but 1 are needed: response is empty (2)",
        ),
        ([ODD[0][0]], [ODD[2][0]], "leaves nothing of the response (1)"),
        ([ODD[0][0]], [ODD[3][0]], "no usable row: prompt longer than 24 tokens (1)"),
        ([ODD[0][0]], [ODD[5][0]], "the reference loss is nan before any step"),
        ([ODD[2][0]], REFERENCE, "no candidate could be scored: the chat template of"),
    ],
    ids=["duplicate ids", "empty", "masked", "over-long", "nan", "no candidate"],
)
def test_what_leaves_nothing_to_measure_is_one_line(
    student, tmp_path, capsys, rows, reference, words
):
    candidates = write(tmp_path / "rows.jsonl", rows)
    references = [write(tmp_path / "reference.jsonl", reference)]
    assert influence(student, candidates, references, tmp_path / "scores.jsonl") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_bfloat16_moments_are_refused_unless_asked_for_by_name(student, tmp_path, capsys):
    candidates = write(tmp_path / "rows.jsonl", [ODD[0][0], ODD[7][0]])
    references = [write(tmp_path / "reference.jsonl", REFERENCE)]
    warmup = write(tmp_path / "warmup.jsonl", REFERENCE)
    out = tmp_path / "scores.jsonl"
    flags = ("--warmup", warmup, "--warmup-moments-dtype", "bfloat16", "--warmup-max-length", "64")
    asked = (student, candidates, references, out, *flags)
    assert influence(*asked, "--optimizer", "adamw") == 2
    error = capsys.readouterr().err
    assert "was warmed up with moments_dtype bfloat16" in error
    assert error.count("\n") == 1
    assert influence(*asked, "--optimizer", "adamw", "--preset", "original") == 0
    assert {row["estimator"] for row in read(out)} == {"exact (preset original, bfloat16)"}
    assert influence(*asked) == 0  # SGD starts from no moments
    assert {row["estimator"] for row in read(out)} == {"exact"}


def test_two_reference_sets_are_as_two_runs(student, tmp_path):
    candidates = write(tmp_path / "rows.jsonl", [row for row, _ in ODD])
    files = {
        "one": write(tmp_path / "one.jsonl", REFERENCE[:3]),
        "two": write(tmp_path / "two.jsonl", REFERENCE[2:]),
    }
    out = tmp_path / "both.jsonl"
    assert influence(student, candidates, [f"{n}={place}" for n, place in files.items()], out) == 0
    both = read(out)
    for name, place in files.items():
        out = tmp_path / f"{name}.jsonl"
        assert influence(student, candidates, [place], out) == 0
        for row, alone in zip(both, read(out), strict=True):
            assert row["reason"] == alone["reason"]
            for column in ("influence", "offset", "standard_error"):
                expected = alone[column] and pytest.approx(alone[column], rel=1e-4, abs=1e-9)
                assert row[f"{column}_{name}"] == expected
                if name == "one":
                    assert row[column] == row[f"{column}_{name}"]
    values = [(row["influence_one"], row["influence_two"]) for row in both if row["influence"]]
    assert len(values) == 3
    assert all(abs(a - b) > 1e-4 for a, b in values)


def test_a_run_killed_after_its_choice_chooses_no_more(student, tmp_path, monkeypatch):
    rows = [
        {"instruction": f"w{i + 5} w6", "response": f"w{i + 8} w{2 * i + 9}", "prompt_id": i // 2}
        for i in range(12)
    ]
    candidates = write(tmp_path / "rows.jsonl", rows)
    reference = write(tmp_path / "reference.jsonl", REFERENCE)
    settings = InfluenceConfig(
        method="linearized", optimizer="sgd", learning_rate=1e-2, max_length=LONGEST, chunk=4,
        pilots=3, audit=8,
    )  # fmt: skip

    # One optimizer for all attempts, so that its programs are compiled once.
    monkeypatch.setattr(stage, "open_student", cache(stage.open_student))

    def score(name):
        folder = tmp_path / name
        work = Work(folder, 5, Meter(None, "test"), say=lambda text: None, quiet=True)
        out = folder / "scores.jsonl"
        result = stage.influence(student, candidates, reference, settings, work, out=out)
        return json.loads(json.dumps(result)), read(out)  # as a journal holds them

    def killed(*given, **how):
        raise Interrupted("here")

    whole = score("whole")
    assert whole[0]["audit"]["method"] == "linearized"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "score_candidates", killed)
        with pytest.raises(Interrupted):
            score("parts")
    journal = read(tmp_path / "parts" / "chunks.jsonl")
    assert [set(record) for record in journal[1:]] == [{"measured"}, {"measured"}, {"choice"}]
    monkeypatch.setattr(stage, "choose_estimator", killed)
    assert score("parts") == whole


def test_an_audit_that_is_stopped_keeps_what_it_measured(student, tmp_path, monkeypatch):
    rows = [{"instruction": f"w{i + 5} w6", "response": f"w{i + 8} w9"} for i in range(12)]
    candidates = write(tmp_path / "rows.jsonl", rows)
    reference = write(tmp_path / "reference.jsonl", REFERENCE)
    settings = InfluenceConfig(
        method="first_order", optimizer="sgd", learning_rate=1e-2, max_length=LONGEST, chunk=3,
        audit=8,
    )  # fmt: skip

    def score(name, **how):
        work = Work(
            tmp_path / name, 5, Meter(None, "test"), say=lambda text: None, quiet=True, **how
        )
        out = tmp_path / name / "scores.jsonl"
        result = stage.influence(student, candidates, reference, settings, work, out=out)
        return json.loads(json.dumps(result)), read(out)

    whole = score("whole")
    with pytest.raises(Interrupted):
        score("parts", stop=StopAfter(2))
    journal = tmp_path / "parts" / "chunks.jsonl"
    header, *measured = read(journal)
    assert [len(record["measured"]) for record in measured] == [3, 3]
    # What is there already is taken as it is.
    place = next(iter(measured[0]["measured"]))
    measured[0]["measured"][place]["influence"] = 12.0
    write(journal, [header, *measured])
    again, scores = score("parts")
    assert scores == whole[1]
    truths = [one["truth"] for one in again["audit"]["scores"]]
    before = [one["truth"] for one in whole[0]["audit"]["scores"]]
    assert [truth for truth in truths if truth not in before] == [12.0]
    assert len(read(journal)[1:]) == 8  # three of the audit, the choice, four chunks


class StopAfter:
    """A stop flag that is raised at the ``count``-th look at it."""

    def __init__(self, count: int):
        self.left = count

    def check(self):
        self.left -= 1
        if not self.left:
            raise Interrupted("here")


def test_a_killed_run_goes_on_at_the_next_chunk_on_other_devices_and_on_no_other_rows(
    student, tmp_path
):
    def rows(last):
        made = [{"instruction": f"w{i + 5} w6", "response": f"w{i + 8} w9"} for i in range(7)]
        return write(tmp_path / "rows.jsonl", [*made, {"instruction": "w7", "response": last}])

    reference = write(tmp_path / "reference.jsonl", REFERENCE)
    settings = InfluenceConfig(
        method="exact", audit=0, optimizer="sgd", learning_rate=1e-2, max_length=LONGEST, chunk=3
    )
    said = []

    def score(name, mesh=None, **how):
        work = Work(tmp_path / name, 5, Meter(None, "test"), say=said.append, quiet=True, **how)
        out = tmp_path / name / "scores.jsonl"
        stage.influence(student, candidates, reference, settings, work, out=out, mesh=mesh)
        return [row["influence"] for row in read(out)]

    candidates = rows("w8")
    whole = score("whole")
    with pytest.raises(Interrupted):
        score("parts", stop=StopAfter(1))
    journal = tmp_path / "parts" / "chunks.jsonl"
    [header, choice, chunk] = read(journal)
    assert (chunk["chunk"], len(chunk["scores"])) == (0, 3)
    chunk["scores"][0]["influence"] = 12.0  # what is there already is taken as it is
    write(journal, [header, choice, chunk])
    resumed = score("parts", mesh=mesh_on("candidate"))
    assert resumed == [12.0, *(pytest.approx(one, rel=1e-3) for one in whole[1:])]
    assert any("programs compiled" in line for line in said)

    candidates = rows("w9")
    with pytest.raises(UserError, match=r"holds work done with other settings \(candidates: "):
        score("parts")
