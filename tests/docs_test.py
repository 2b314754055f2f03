"""The code in the docs runs, and the commands in them name settings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text()))
        if kind == language
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_docs_runs(code, capsys):
    import jax

    # As a reader has JAX: without this suite's strictness.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "docs", "exec"), {"__name__": "docs"})
    lines = capsys.readouterr().out.splitlines()
    exact, estimated = (eval(line.split(" ", 1)[1]) for line in lines)
    assert len(exact) == len(estimated) == 4
    assert exact == pytest.approx(estimated, rel=0.1, abs=1e-6)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_page_has_a_result_left_to_fill_in():
    for page in PAGES:
        assert "@RESULT@" not in page.read_text(), page.name
