"""The code in the docs runs, and the commands in them name settings that exist."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_world import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Path:
    """A folder as the docs have it: a student and candidates for it."""
    import jax

    from montessori_jax.data.rows import read_rows
    from montessori_jax.models import Model, ModelConfig
    from montessori_jax.models.folder import save_folder

    rows = read_rows("package:seeds").rows
    tokenizer = tiny_tokenizer([f"{row.instruction} {row.response}" for row in rows])
    config = ModelConfig(
        family="llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    model = Model(config)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    params = model.init(jax.random.key(0))
    save_folder(tmp_path / "student", model, params, tokenizer, {"eos_token_id": ends})
    lines = [
        json.dumps({"id": row.id, "instruction": row.instruction, "response": row.response})
        for row in rows[:6]
    ]
    (tmp_path / "candidates.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_in_the_docs_runs(page, reader, capsys, monkeypatch):
    import jax

    from montessori_jax.influence import METHODS

    for name, method in list(METHODS.items()):
        monkeypatch.setitem(METHODS, name, method)
    monkeypatch.setitem(METHODS, "midpoint", None)  # which the page adds; gone afterwards
    # In order, as a reader types them, and as a reader has JAX: without this suite's strictness.
    names: dict[str, Any] = {"__name__": "docs"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in blocks(page, "python"):
            exec(compile(code, page.name, "exec"), names)
    printed = capsys.readouterr().out
    found = dict(line.split(" ", 1) for line in printed.splitlines() if "[" in line)
    exact, estimated = (ast.literal_eval(found[name]) for name in ("exact", "first_order"))
    assert len(exact) == len(estimated) == 4
    assert exact == pytest.approx(estimated, rel=0.1, abs=1e-6)
    # Three of the six, the best first, and a line for each token of the best one's response.
    shown = re.findall(r"^(seed-\d+) (\S+) nats$", printed, re.MULTILINE)
    assert len(shown) == 3
    values = [float(value) for _, value in shown]
    assert values == sorted(values, reverse=True)
    assert max(score.influence for score in names["scores"]) == pytest.approx(values[0], rel=0.01)
    tokens = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("  ")]
    assert len(tokens) > 3
    assert sum(tokens) == pytest.approx(values[0], rel=0.05)  # SGD has no shared step


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_page_has_a_result_left_to_fill_in():
    for page in PAGES:
        assert "@RESULT@" not in page.read_text(), page.name
