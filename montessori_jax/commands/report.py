"""`montessori report`."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import add_command
from montessori_jax.stopping import Stop


def add_report(commands: Any) -> None:
    """Declare ``report``."""
    parser = add_command(
        commands,
        "report",
        "The table of runs, finished or not, and a page of figures and samples.",
        _report,
        epilog="Example: montessori report runs/one runs/two --out comparison",
    )
    parser.add_argument("run_dir", nargs="+", metavar="RUN", help="run directories, or their URLs")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="where report.html and figures/ are written; by default the run's folder, or the "
        "folder 'report' for several runs or a URL",
    )
    parser.add_argument(
        "--with",
        dest="measurements",
        metavar="JSON",
        nargs="+",
        default=[],
        help="show these measurements too: teacher curves, head-to-head or cross-student results "
        "(docs/report.md)",
    )
    parser.add_argument("--no-page", action="store_true", help="only print the table")


def _report(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.report import page
    from montessori_jax.report.run_data import is_read
    from montessori_jax.report.summary import summarise
    from montessori_jax.report.table import render
    from montessori_jax.runs import RunDirectory
    from montessori_jax.storage import is_summed_up, is_url, summary_folder

    wanted = not parsed.no_page and page.available()
    with ExitStack() as stack:
        folders = []
        for run_dir in parsed.run_dir:
            folder = stack.enter_context(
                summary_folder(run_dir, is_read if wanted else is_summed_up)
            )
            folders.append(folder)
            print(render(summarise(RunDirectory.existing(folder))))
        if not wanted:
            if not parsed.no_page:
                print("For the page of figures and samples: pip install 'montessori-jax[report]'")
            return
        alone = len(folders) == 1 and not is_url(parsed.run_dir[0])
        out = Path(parsed.out or (folders[0] if alone else "report"))
        measurements = [Path(name) for name in parsed.measurements]
        print(f"The page: {page.write_page(folders, out, measurements)}")
