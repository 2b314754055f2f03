"""The command line on the user's own files, in this process, with a tiny random model."""

import errno
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from montessori_jax.cli import run
from montessori_jax.data.rows import read_rows
from montessori_jax.errors import LostProcess, UserError, status_of
from montessori_jax.models import Model, ModelConfig
from montessori_jax.models.folder import save_folder
from tests.tiny_world import tiny_tokenizer

STAGES = [
    "generate",
    "sft",
    "influence",
    "select",
    "preferences",
    "dpo",
    "evaluate",
    "run",
    "report",
]
ROWS = [
    {"instruction": "Name a colour.", "response": "Blue is one."},
    {"instruction": "", "response": "no question"},
    {"instruction": "Add these.", "input": "2 and 3", "output": "They make 5."},
    {"instruction": "Say nothing.", "response": "   "},
    {
        "messages": [
            {"role": "user", "content": "Greet me."},
            {"role": "assistant", "content": "Good morning!"},
        ]
    },
]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    rows = read_rows("package:seeds").rows
    tokenizer = tiny_tokenizer([f"{row.instruction} {row.response}" for row in rows])
    model = Model(
        ModelConfig(
            family="llama",
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            max_position_embeddings=512,
        )
    )
    folder = tmp_path_factory.mktemp("student") / "model"
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    save_folder(folder, model, model.init(jax.random.key(0)), tokenizer, {"eos_token_id": ends})
    return str(folder)


@pytest.fixture
def candidates(tmp_path) -> Path:
    path = tmp_path / "candidates.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(3, "{not json")
    path.write_text("\n".join(lines) + "\n")
    return path


def scores_of(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def influence(student, candidates, out, *more) -> int:
    return run(
        [
            *("influence", "--student", student, "--candidates", str(candidates)),
            *("--reference", "package:reference", "--num-reference", "5", "--out", str(out)),
            *("--max-length", "256", "--learning-rate", "1e-2", "--quiet", *more),
        ]
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_help(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        run([stage, "--help"])
    assert caught.value.code == 0
    assert "usage: montessori" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_influence_writes_one_row_per_candidate_in_order(student, candidates, tmp_path, suffix):
    out = tmp_path / f"scores{suffix}"
    assert influence(student, candidates, out, "--optimizer", "sgd", "--method", "exact") == 0
    rows = scores_of(out)
    assert [row["index"] for row in rows] == list(range(6))
    assert [row["influence"] is not None for row in rows] == [True, False, True, False, False, True]
    for row in rows:
        if row["influence"] is None:
            assert row["reason"]
            continue
        difference = row["reference_loss_before"] - row["reference_loss_after"]
        assert row["influence"] == pytest.approx(difference, abs=1e-9)
        assert row["estimator"] == "exact"
    # Nothing of the work in progress stays behind.
    assert {path.name for path in tmp_path.iterdir()} == {candidates.name, out.name}


def test_first_order_agrees_with_exact_and_its_audit_is_printed(
    student, candidates, tmp_path, capsys
):
    small = ("--optimizer", "sgd", "--learning-rate", "1e-4")
    assert influence(student, candidates, tmp_path / "a.jsonl", *small) == 0
    first = ("--method", "first_order", "--audit", "3")
    assert influence(student, candidates, tmp_path / "b.jsonl", *small, *first) == 0
    assert "audit of 3 by exact: Spearman 1.000" in capsys.readouterr().out
    exact, estimated = (
        [row["influence"] for row in scores_of(tmp_path / name) if row["influence"] is not None]
        for name in ("a.jsonl", "b.jsonl")
    )
    np.testing.assert_allclose(estimated, exact, rtol=0.02)


def test_a_fresh_adamw_is_warned_of_and_a_warmed_up_one_is_not(
    student, candidates, tmp_path, capsys
):
    assert influence(student, candidates, tmp_path / "a.jsonl") == 0
    assert "sign of its gradient" in capsys.readouterr().out
    warm = ("--warmup", "package:seeds", "--warmup-rows", "8", "--warmup-batch-size", "4")
    assert influence(student, candidates, tmp_path / "b.jsonl", *warm) == 0
    assert "sign of its gradient" not in capsys.readouterr().out
    a, b = (scores_of(tmp_path / name)[0] for name in ("a.jsonl", "b.jsonl"))
    assert a["offset"] == pytest.approx(0.0, abs=1e-9)
    assert b["offset"] != 0.0


def test_sft_keeps_a_student_that_influence_takes(student, candidates, tmp_path):
    out = tmp_path / "warm"
    training = ("--data", "package:seeds", "--rows", "6", "--batch-size", "3", "--quiet")
    assert run(["sft", "--student", student, *training, "--out", str(out), "--keep-optimizer"]) == 0
    assert influence(str(out), candidates, tmp_path / "scores.jsonl") == 0


def test_a_judge_is_not_paid_for_what_is_thrown_away(student, capsys):
    chosen = ("--evaluations", "alpaca_eval", "mt_bench", "--quiet")
    assert run(["evaluate", "--student", student, *chosen]) == 2
    assert "alpaca_eval and mt_bench: a judge is paid for what --out" in capsys.readouterr().err


def test_sft_and_evaluate_on_the_users_files(student, candidates, tmp_path):
    out = tmp_path / "trained"
    settings = ("--learning-rate", "1e-2", "--warmup-ratio", "0", "--epochs", "8", "--quiet")
    data = ("--data", str(candidates), "--batch-size", "4", "--out", str(out))
    assert run(["sft", "--student", student, *data, *settings]) == 0
    losses = []
    for name in (student, str(out / "student")):
        result = tmp_path / "evaluation.json"
        heldout = ("--heldout", str(candidates), "--out", str(result), "--quiet")
        assert run(["evaluate", "--student", name, *heldout]) == 0
        losses.append(json.loads(result.read_text())["reference_loss"]["loss"])
        [row] = scores_of(tmp_path / "evaluation.metrics.jsonl")
        assert row["step"] == 0
        assert row["reference_loss"]["loss"] == losses[-1]
        assert "by_sample" not in row["reference_loss"]
    assert losses[1] < losses[0] - 0.1


def test_dpo_on_the_users_pairs(student, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "chosen": "A good answer.",
            "rejected": [{"role": "assistant", "content": "A bad one."}],
        }
        for i in range(4)
    ]
    rows += [
        {"prompt": "Plain text:", "chosen": " yes", "rejected": " no"},
        {"prompt": "Malformed", "chosen": "", "rejected": "x"},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "dpo"
    settings = ("--learning-rate", "1e-2", "--warmup-ratio", "0", "--epochs", "3", "--quiet")
    arguments = ("--pairs", str(pairs), "--heldout", str(pairs), "--out", str(out))
    assert run(["dpo", "--teacher", student, *arguments, *settings]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"]
    assert (out / "teacher" / "model.safetensors").is_file()


def test_preferences_from_files(tmp_path):
    candidates, scores = tmp_path / "candidates.jsonl", tmp_path / "scores.jsonl"
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "pairs"
    candidates.write_text(
        "".join(
            json.dumps({"id": f"a-{i}", "prompt_id": "a", "raw": f"text {i}"}) + "\n"
            for i in range(3)
        )
    )
    values = [0.5, None, -0.25]
    scores.write_text(
        "".join(json.dumps({"id": f"a-{i}", "influence": v}) + "\n" for i, v in enumerate(values))
    )
    prompts.write_text(json.dumps({"prompt_id": "a", "prompt": "ask", "prefill": "<"}) + "\n")
    files = ("--candidates", str(candidates), "--scores", str(scores), "--out", str(out))
    assert run(["preferences", *files, "--rule", "sign"]) == 0
    (pair,) = pq.read_table(out / "pairs" / "data.parquet").to_pylist()
    assert (pair["chosen"], pair["rejected"], pair["prefill"]) == ("text 0", "text 2", "<")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["influence", "--candidates", "absent.jsonl", "--out", "s.jsonl"], "learning"),
        (["influence", "--candidates", "x", "--out", "scores.csv"], ".jsonl or .parquet"),
        (["evaluate", "--student", "no/such/model"], "no/such/model"),
        (["evaluate", "--max-length", "many"], "max_length"),
        (["run", "absent.yaml"], "absent.yaml"),
        (["report", "absent"], "no run here"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words, capsys, student, monkeypatch):
    if arguments[0] == "influence":
        arguments = [*arguments, "--student", student]
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("montessori: error: ")
    assert words in error
    assert error.count("\n") == 1


def test_yaml_and_overrides_reach_a_stage(student, candidates, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"student: {student}\ninfluence: {{method: exact, optimizer: sgd}}\n")
    out = tmp_path / "scores.jsonl"
    arguments = ["influence", "--config", str(config), "--candidates", str(candidates)]
    more = ["--out", str(out), "--num-reference", "3", "--quiet", "influence.learning_rate=0.01"]
    assert run([*arguments, *more]) == 0
    assert {row["estimator"] for row in scores_of(out)} == {"exact", None}


def test_an_argument_that_does_not_fit_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(["sft", "--data", "rows.jsonl", "--out", "there", "--seed", "many"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--seed" in said
    assert "montessori sft --help" in said


def test_a_tracker_is_one_word_of_a_stage_command(student, candidates, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[trackers]'")
    out = tmp_path / "warm"
    training = ("--data", str(candidates), "--batch-size", "3", "--quiet", "--out", str(out))
    assert run(["sft", "--student", student, *training, "tracker=tensorboard"]) == 0
    assert list(out.glob("tensorboard/sft/events.out.tfevents.*"))
    assert (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (TimeoutError("no answer"), 75),
        (LostProcess("process 1 has gone"), 75),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 2),
        (UserError("mesh.fsdp 3"), 2),
        (ValueError("ours"), 1),
    ],
    ids=str,
)
def test_launchers_are_told_whether_to_try_again(error, status):
    assert status_of(error) == status
