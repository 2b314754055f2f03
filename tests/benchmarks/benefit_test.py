"""The study of benefit in small: sets that do not overlap, its intervals, and going on."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import benefit
from benchmarks.benefit_summary import Trainings, interval, summary
from benchmarks.fidelity import MODEL, encoded
from montessori_jax.data.rows import read_rows

WORDS = [f"word{number}" for number in range(20)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty rows of random words, no two alike."""
    draw = np.random.default_rng(0)
    rows = [
        {"instruction": " ".join(draw.choice(WORDS, 12)), "output": " ".join(draw.choice(WORDS, n))}
        for n in draw.integers(12, 40, 60)
    ]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def student(source: Path) -> benefit.Student:
    chats = encoded(read_rows(source).rows)
    return benefit.Student(MODEL, chats, lambda seed: MODEL.init(jax.random.key(seed)))


def test_the_four_sets_are_all_rows_once(source: Path) -> None:
    one = student(source)
    rows = benefit.deal(one, benefit.SMALL, seed=3, noise=0.0)
    parts = (rows.warmup, rows.pool, rows.references, rows.heldout)
    assert [len(part) for part in parts] == [60 - 32, 16, 8, 8]
    texts = [chat.tokens.tobytes() for part in parts for chat in part]
    assert sorted(texts) == sorted(chat.tokens.tobytes() for chat in one.chats)
    assert not rows.swapped.any()
    other = benefit.deal(one, benefit.SMALL, seed=4, noise=0.0)
    assert {chat.tokens.tobytes() for chat in other.pool} != set(texts[28:44])


def test_noise_swaps_responses_and_nothing_else(source: Path) -> None:
    one = student(source)
    true = benefit.deal(one, benefit.SMALL, seed=3, noise=0.0)
    rows = benefit.deal(one, benefit.SMALL, seed=3, noise=0.5)
    assert rows.swapped.sum() == 8
    answers = []
    for old, new, swapped in zip(true.pool, rows.pool, rows.swapped, strict=True):
        at = old.prompt_length
        assert new.prompt_length == at
        assert new.tokens[:at].tolist() == old.tokens[:at].tolist()
        assert (new.tokens[at:].tolist() == old.tokens[at:].tolist()) == (not swapped)
        answers.append((old.tokens[at:].tolist(), new.tokens[at:].tolist()))
    # None is cut here, so that the swapped responses are the old ones in another order.
    assert sorted(old for old, _ in answers) == sorted(new for _, new in answers)
    for name in ("warmup", "references", "heldout"):
        assert getattr(rows, name) == getattr(true, name)


def test_an_interval_by_hand() -> None:
    # Three values with a standard deviation of 1; the t quantile with 2 degrees is 4.302653.
    found = interval([1.0, 2.0, 3.0])
    half = 4.302653 / np.sqrt(3)
    assert found["mean"] == 2.0
    np.testing.assert_allclose([found["low"], found["high"]], [2 - half, 2 + half], rtol=1e-6)
    assert interval([1.5]) == {"mean": 1.5, "low": None, "high": None}


def test_differences_are_paired_by_seed_and_signed_as_help() -> None:
    def seed(base: float) -> Trainings:
        def one(loss: float) -> dict[str, object]:
            facts = {"places": [0, 1], "response_tokens": 5.0, "swapped": 0.0}
            return {"heldout": base + loss, "reference": base + 2 * loss, **facts}

        made = {f"{name}/bottom": [one(-0.1)] for name in benefit.SELECTORS}
        made |= {f"{name}/top": [one(-0.4)] for name in benefit.SELECTORS}
        before = {"heldout": base, "reference": base, "warmup_loss": base}
        return {"before": [before], **made, "random": [one(-0.2), one(-0.3)]}

    found = summary([seed(1.0), seed(3.0), seed(4.0)])
    top = found["trained_on"]["exact/top"]
    np.testing.assert_allclose(list(top["gain"]["heldout"].values()), 0.4, rtol=1e-9)
    np.testing.assert_allclose(list(top["minus_random"]["heldout"].values()), 0.15, rtol=1e-9)
    np.testing.assert_allclose(list(top["minus_random"]["reference"].values()), 0.3, rtol=1e-9)
    less = found["top_minus_bottom"]["exact"]["heldout"]
    np.testing.assert_allclose(list(less.values()), 0.3, rtol=1e-9)


def drawn_scores(
    student: benefit.Student, plan: benefit.Plan, case: benefit.Case, method: str
) -> dict[str, list[float]]:
    draw = np.random.default_rng(len(method))
    return {name: draw.normal(size=plan.pool).tolist() for name in ("influence", "candidate_loss")}


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_small_study_runs_and_goes_on_where_it_was(
    measured: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["benefit", "--small", "--rows", str(source), "--folder", str(tmp_path)]
    if not measured:
        monkeypatch.setattr(benefit, "scores", drawn_scores)
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "1", "--noise", "0.25"])
    benefit.main()
    first = capsys.readouterr().out
    journal = tmp_path / "rows.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines()
    found = {row["row"]: row["found"] for row in map(json.loads, lines[1:])}
    # The student before, four scorings, six selectors at both ends, two random draws.
    assert len(found) == 1 + 4 + 12 + 2
    case = "noise 0.25/rate 0.0001/seed 0"
    exact = np.array(found[f"{case}/scores/exact"]["influence"])
    top = found[f"{case}/exact/top"]["places"]
    assert len(top) == 4
    assert exact[top].min() >= np.delete(exact, top).max()
    bottom = found[f"{case}/exact/bottom"]["places"]
    assert exact[bottom].max() <= np.delete(exact, bottom).min()
    # A lost row is made again and equals what it was; all others are read.
    journal.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    benefit.main()
    again = capsys.readouterr().out
    assert journal.read_text(encoding="utf-8").splitlines() == lines
    assert again.count(" s\n") == 1
    assert first[first.index("\n\nnoise") :] == again[again.index("\n\nnoise") :]
