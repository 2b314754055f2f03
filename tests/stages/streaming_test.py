"""Pools of any size: memory that does not grow with them, and a handful of programs."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models import tiny

# One run of the command in a process of its own, and its peak of memory (as Linux has it, in kB).
RUN = """
import resource, sys
from montessori_jax.cli import run
code = run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""
ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ 'w4 ' if m['role'] == 'assistant' else 'w3 ' }}"
    "{{ m['content'] + ' w2 ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "tiny"
    shape = {"num_hidden_layers": 1, "max_position_embeddings": 512}
    tiny.torch_model({**tiny.CONFIG, **shape}).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, shortest: int, longest: int):
    """Rows of ``shortest`` to ``longest`` tokens in turn, no two alike; 3 letters a token."""
    for i in range(count):
        size = shortest + (37 * i) % (longest - shortest)
        words = [f"w{5 + (7 * i + k * (1 + i % 5)) % 54}" for k in range(size)]
        yield {
            "instruction": " ".join(words[: size // 3]),
            "response": " ".join(words[size // 3 :]),
        }


def score(
    folder: Path, student: Path, method: str, pool, *more: str
) -> tuple[list[dict], int, int]:
    """The scores, how many programs were compiled, and the peak in MiB."""
    folder.mkdir()
    candidates, reference, out = (folder / f"{n}.jsonl" for n in ("rows", "reference", "scores"))
    with candidates.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in pool)
    reference.write_text("".join(json.dumps(row) + "\n" for row in rows(4, 20, 60)))
    done = subprocess.run(
        [
            *(sys.executable, "-c", RUN, "influence", "--student", student, "--quiet"),
            *("--candidates", candidates, "--reference", reference, "--out", out),
            *("--method", method, "--audit", "0", "--optimizer", "sgd", "--learning-rate", "1e-2"),
            *more,
        ],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    programs = int(re.search(r"(\d+) programs compiled", done.stdout)[1])
    peak = int(re.search(r"peak (\d+)", done.stdout)[1])
    return [json.loads(line) for line in out.read_text().splitlines()], programs, peak


@pytest.mark.parametrize(
    "method", ["linearized", pytest.param("first_order", marks=pytest.mark.slow)]
)
def test_programs_do_not_grow_with_candidates(student, tmp_path, method):
    # Lengths of 10 to 120 tokens: rows of three lengths, whatever their number.
    few = score(tmp_path / "few", student, method, rows(32, 10, 120))
    many = score(tmp_path / "many", student, method, rows(128, 10, 120))
    assert (len(few[0]), len(many[0])) == (32, 128)
    assert many[1] <= few[1] + 4
    assert all(row["influence"] is not None for row in many[0])


@pytest.mark.slow
def test_memory_does_not_grow_with_candidates(student, tmp_path):
    # 9,000 candidates more would be 130 MB padded to 512 tokens, and their texts 15.
    found = {}
    for count in (1000, 10_000):
        began = time.monotonic()
        given = (tmp_path / str(count), student, "linearized", rows(count, 250, 500))
        scores, programs, peak = score(*given, "--chunk", "64")
        seconds = time.monotonic() - began
        print(f"{count}: {peak} MiB at most, {programs} programs, {seconds:.0f} s")
        assert len({row["id"] for row in scores}) == count
        found[count] = peak
    assert found[10_000] < 1.05 * found[1000]
