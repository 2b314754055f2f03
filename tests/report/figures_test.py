"""What the figures draw: every iteration's data, curves with all that they have, any name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from montessori_jax.report import plots, verbs
from montessori_jax.report.drawing import Figure
from montessori_jax.report.measured import Measured, read_measured
from montessori_jax.report.page import FIGURES, write_page
from montessori_jax.report.run_data import Run, read_run
from montessori_jax.report.sections import MOST_ITERATIONS, data, teachers
from tests.report import browser
from tests.report.run_folder import write_run


def drawn(section: Callable[[Callable[[Figure], str]], str]) -> tuple[dict[str, Any], str]:
    """The axes of each figure of a section by its name, and the section."""
    found: dict[str, Any] = {}

    def draw(figure: Figure) -> str:
        axes = found[figure.name] = Canvas().subplots()
        figure.draw(axes)
        return figure.inline(None)

    page = section(draw)
    return found, page


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def of_iterations(folder: Path, count: int) -> Run:
    write_run(folder, iterations=count)
    for number in range(2, count + 1):
        shutil.copytree(folder / "iteration-1", folder / f"iteration-{number}")
    return read_run(folder, folder.name)


def test_the_data_of_every_iteration_share_a_figure(tmp_path: Path):
    run = of_iterations(tmp_path / "run", 2)
    found, page = drawn(lambda draw: data([run], draw, parse=False))
    assert list(found) == [
        f"lengths-{kind}-run-iteration-1-and-2" for kind in ("instructions", "responses")
    ]
    medians = [
        text.partition(" (")[0] for text in legend(found["lengths-responses-run-iteration-1-and-2"])
    ]
    assert medians == [
        "run:1, untuned teacher", "run:1, tuned teacher",
        "run:2, untuned teacher", "run:2, tuned teacher",
    ]  # fmt: skip
    assert "iterations, 1" not in page


def test_of_many_iterations_some_are_shown_and_the_page_says_which(tmp_path: Path):
    run = of_iterations(tmp_path / "run", MOST_ITERATIONS + 1)
    found, page = drawn(lambda draw: data([run], draw, parse=False))
    assert "run: data of 6 of its 7 iterations, 1, 2, 3, 5, 6, 7." in page
    # Six colours, two data sets an iteration.
    assert [name for name in found if "responses" in name] == [
        "lengths-responses-run-iteration-1-and-2-and-3",
        "lengths-responses-run-iteration-5-and-6-and-7",
    ]


def test_the_verbs_of_every_iteration_are_on_the_page(tmp_path: Path):
    if not verbs.available():
        pytest.skip("needs the extra verbs")
    of_iterations(tmp_path / "run", 2)
    page = write_page([tmp_path / "run"], tmp_path / "out").read_text()
    assert '<figure id="figure-verbs-run-iteration-1-and-2">' in page
    drawn_once = (tmp_path / "out" / FIGURES / "verbs-run-iteration-1-and-2.svg").read_text()
    assert "run:2, tuned teacher" in drawn_once
    assert ">write<" in drawn_once


def test_shares_above_the_zero_gradient_step_are_a_second_line():
    rows = [{"step": n, "share": 0.1 * n, "share_relative": 0.5, "data": "tuned"} for n in (2, 1)]
    found, _ = drawn(lambda draw: teachers(Measured(influence_curves={"run": rows}), draw))
    axes = found["positive-share"]
    assert legend(axes) == ["tuned", "tuned, above the zero-gradient step"]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert axes.lines[1].get_ydata().tolist() == [0.5, 0.5]
    old = [{"step": 1, "share": 0.2}]
    found, _ = drawn(lambda draw: teachers(Measured(influence_curves={"run": old}), draw))
    assert len(found["positive-share"].lines) == 1
    assert found["positive-share"].get_legend() is None


def test_a_teacher_curve_has_its_evaluations_and_quantiles(tmp_path: Path):
    bench = {"score": 5.0, "standard_error": 0.5, "questions": 80, "cost": {"judge": "gpt-4o"}}
    rows: list[dict[str, Any]] = [
        {
            "step": step, "influence": 0.1, "student_loss": 2.0,
            "influence_quantiles": [-0.2, -0.1, 0.0, 0.1, 0.2 + step],
            "evaluation": {
                "student": "s", "reference_loss": {"loss": 2.0}, "mt_bench": bench,
                "alpaca_eval": {"win_rate": 50.0 + step, "baseline": "x"},
            },
        }
        for step in (0, 40)
    ]  # fmt: skip
    old = [{"step": 0, "influence": 0.1}, {"step": 40, "influence": None}]
    for name, content in (("new", rows), ("old", old)):
        (tmp_path / name).write_text(json.dumps({"teacher_curve": content}))
    measured = read_measured([(name, tmp_path / name) for name in ("old", "new")])
    found, page = drawn(lambda draw: teachers(measured, draw))
    assert list(found) == [
        "teacher-influence", "teacher-student-loss", "teacher-influence-quantiles",
        "teacher-mt-bench-score-of-10-gpt-4o-80-questions", "teacher-alpacaeval-win-rate-against-x",
    ]  # fmt: skip
    rates = found["teacher-alpacaeval-win-rate-against-x"]
    assert rates.get_ylabel() == "AlpacaEval, win rate, % (against x)"
    assert rates.lines[0].get_ydata().tolist() == [50.0, 90.0]
    scores = found["teacher-mt-bench-score-of-10-gpt-4o-80-questions"]
    assert scores.get_ylabel() == "MT-Bench, score of 10"  # the caption has the rest
    band = scores.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((5 - 0.98, 5 + 0.98))
    spread = found["teacher-influence-quantiles"]
    assert [line.get_ydata().tolist() for line in spread.lines[:3]] == [
        [0.0, 0.0], [-0.2, -0.2], [0.2, 40.2]
    ]  # fmt: skip
    half = spread.collections[0].get_paths()[0].vertices[:, 1]
    assert (half.min(), half.max()) == (-0.1, 0.1)
    assert "a band from 25% to 75%" in page


def test_names_that_begin_with_an_underscore_are_in_the_legend(tmp_path: Path):
    values = np.array([0.1, 0.2])
    figure = plots.influence({"_a": (values, None), "_b": (values, None)})
    axes = Canvas().subplots()
    figure.draw(axes)
    assert [text.strip() for text in legend(axes)] == ["_a", "_b"]
    write_run(tmp_path / "_a")
    write_run(tmp_path / "_b")
    page = write_page([tmp_path / "_a", tmp_path / "_b"], tmp_path / "out", parse=False)
    assert "_a, iteration 1" in page.read_text()


def test_a_figures_file_is_xml_whatever_a_run_is_called(tmp_path: Path):
    plots.seconds([("a\ufffe\uffff\x00b", {"train": 1.0}), ("c", {"train": 2.0})]).inline(tmp_path)
    text = (tmp_path / "cost.svg").read_text(encoding="utf-8")
    assert "U+FFFE" in "".join(ElementTree.fromstring(text).itertext())


@pytest.mark.parametrize(
    ("value", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_without_a_browser_integration_fails_and_others_skip(
    tmp_path: Path, monkeypatch, value: str, outcome: type[BaseException]
):
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    monkeypatch.setenv("CI", value)
    with pytest.raises(outcome, match="chromium"), browser.started(tmp_path):
        pass
