"""The report as one HTML file that opens offline, with its figures as files beside it."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from montessori_jax import __version__
from montessori_jax.errors import UserError
from montessori_jax.report import records, sections
from montessori_jax.report.drawing import Figure
from montessori_jax.report.markup import escape, json_block, note, section
from montessori_jax.report.measured import in_run, read_measured
from montessori_jax.report.run_data import labels, read_run
from montessori_jax.report.samples import collect
from montessori_jax.runs import write_atomic

NAME = "report.html"
FIGURES = "figures"
TITLES = {
    "overview": "Overview", "results": "Results", "teacher": "Teacher", "influence": "Influence",
    "comparisons": "Comparisons", "samples": "Samples", "data": "Data", "cost": "Cost",
    "settings": "Settings",
}  # fmt: skip


def available() -> bool:
    """Whether the extra ``report`` is installed."""
    return find_spec("matplotlib") is not None


def write_page(
    run_folders: Sequence[Path],
    out: Path,
    measurements: Sequence[Path] = (),
    *,
    parse: bool = True,
) -> Path:
    """Write ``out/report.html`` and ``out/figures/NAME.svg`` and ``.png``; returns the page.

    Args:
        run_folders: runs, finished or not.
        out: the folder, made if need be.
        measurements: more files of the formats of `montessori_jax.report.measured`, beside those
            in the runs' own folders.
        parse: look for the root verbs of instructions too, which takes seconds.

    Raises:
        UserError: no run there, a measurement is malformed, or the extra is not installed.
    """
    if not available():
        raise UserError("the page needs its figures: pip install 'montessori-jax[report]'")
    named = list(
        dict(zip((one.resolve() for one in run_folders), run_folders, strict=True)).values()
    )
    runs = [read_run(path, label) for path, label in zip(named, labels(named), strict=True)]
    measured = read_measured(
        [(run.label, file) for run in runs for file in in_run(run.path)]
        + [(file.stem, file) for file in measurements]
    )
    drawn: dict[str, str] = {}

    def draw(figure: Figure) -> str:
        # Two runs whose names differ in signs alone must not share a file.
        while figure.name in drawn:
            figure = figure.renamed(f"{figure.name}-2")
        drawn[figure.name] = figure.inline(out / FIGURES)
        return drawn[figure.name]

    data = collect(runs)
    parts = {
        "overview": sections.overview(runs),
        "results": sections.results(runs, draw),
        "teacher": sections.teachers(measured, draw),
        "comparisons": sections.comparisons(measured, draw),
        "influence": sections.influence(runs, draw),
        "samples": _samples(len(data["samples"])),
        "data": sections.data(runs, draw, parse=parse),
        "cost": records.costs(runs, draw),
        "settings": records.settings(runs),
    }
    links = "".join(
        f'<li><a href="#{name}">{TITLES[name]}</a></li>' for name, part in parts.items() if part
    )
    style, script = _asset("report.css"), _asset("report.js")
    fields = {
        "POLICY": (
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
            f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
        ),
        "TITLE": escape(", ".join(run.label for run in runs)),
        "STYLE": style,
        "LINKS": links,
        "MAIN": "\n".join(part for part in parts.values() if part),
        "FOOTER": records.footer(__version__, f"Figures as SVG and PNG are in {FIGURES}/."),
        "DATA": json_block("samples-data", data),
        "SCRIPT": script,
    }
    page = _asset("report.html")
    pieces = [piece.partition("}}") for piece in page.split("{{")]
    text = pieces[0][0] + "".join(fields[name] + rest for name, _, rest in pieces[1:])
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / NAME, text)
    return out / NAME


def _samples(count: int) -> str:
    """The place that the script fills."""
    if not count:
        return section("samples", "Samples", note("No sample has a measured influence yet."))
    return section("samples", "Samples", _asset("samples.html"))


def _asset(name: str) -> str:
    return files("montessori_jax.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A text between its tags as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
