"""`montessori select`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import ROWS, add_command, row_count
from montessori_jax.stopping import Stop

EXAMPLES = """\
examples:
  the best tenth, two of a prompt at most, near-duplicates once:
    montessori select scores.jsonl --candidates rows.jsonl --out best.jsonl \\
      --top-share 0.1 --per-group 2 --spread
  all that surely helps (control_variate's scores have standard errors):
    montessori select scores.parquet --candidates rows.jsonl --out helps.jsonl \\
      --threshold 0 --lower-bound 2
  the 50 most harmful for a second reference set:
    montessori select scores.jsonl --candidates rows.jsonl --out worst.jsonl \\
      --by influence_maths --lowest --top-k 50
  then: montessori sft --data best.jsonl ...
"""


def add_select(commands: Any) -> None:
    """Declare ``select``."""
    parser = add_command(
        commands,
        "select",
        "Scored candidates -> the rows to train on, the best first, with their scores.",
        _select,
        epilog=EXAMPLES,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("scores", metavar="SCORES", help="what influence wrote, JSONL or Parquet")
    parser.add_argument("--candidates", required=True, help=f"the rows that were scored: {ROWS}")
    parser.add_argument(
        "--out", required=True, help="the chosen rows with their scores, .jsonl or .parquet"
    )
    parser.add_argument("--top-k", type=row_count, metavar="N", help="this many rows at most")
    parser.add_argument(
        "--top-share", type=float, metavar="SHARE", help="the same as a share of the scored rows"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="only values of at least X (with --lowest at most X); write --threshold=-1e-4",
    )
    parser.add_argument("--lowest", action="store_true", help="from the other end: the smallest")
    parser.add_argument(
        "--by",
        default="influence",
        metavar="COLUMN",
        help="the column to choose by (default influence), such as influence_NAME",
    )
    parser.add_argument(
        "--lower-bound",
        type=float,
        metavar="Z",
        help="choose by influence - Z standard errors, with --lowest by the sum",
    )
    parser.add_argument(
        "--per-group", type=row_count, metavar="K", help="this many rows of one group at most"
    )
    parser.add_argument(
        "--group-by",
        default="prompt_id",
        metavar="COLUMN",
        help="what names a row's group (default prompt_id)",
    )
    parser.add_argument(
        "--spread",
        type=float,
        nargs="?",
        const=0.7,
        metavar="ROUGE",
        help="of near-duplicates only the best: ROUGE-L above this (0.7 without a value)",
    )


def _select(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.stages.select import select_rows

    result = select_rows(
        parsed.scores,
        parsed.candidates,
        Path(parsed.out),
        by=parsed.by,
        lower_bound=parsed.lower_bound,
        lowest=parsed.lowest,
        top_k=parsed.top_k,
        top_share=parsed.top_share,
        threshold=parsed.threshold,
        per_group=parsed.per_group,
        group_by=parsed.group_by,
        spread=parsed.spread,
    )
    passed = [
        f"{what} passed over: {count}"
        for what, count in (
            ("near-duplicates", result["alike"]),
            (f"rows above {parsed.per_group} of one {parsed.group_by}", result["crowded"]),
        )
        if count
    ]
    by = parsed.by if parsed.lower_bound is None else f"bound of {parsed.by}"
    print(
        f"{parsed.out}: {result['selected']} of {result['candidates']} rows "
        f"({result['scored']} scored, {result['not']} not {result['reasons'] or ''}); "
        f"{by} {result['first']:+.3e} to {result['last']:+.3e}, mean {result['mean']:+.3e}, "
        f"of all {result['mean_of_all']:+.3e}{''.join(f'; {one}' for one in passed)}"
    )
