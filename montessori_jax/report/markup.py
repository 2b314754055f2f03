"""Text as HTML that shows it and does nothing else: escaped, with its control characters visible.

What a model wrote never gets here: it travels as JSON (`json_block`) and is shown by the page's
script as text nodes.
"""

import html
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Controls but newline and tab, the marks that reorder text (bidirectional), invisible characters,
# tags and what XML forbids; the joiners U+200C and U+200D stay, as Persian and emoji are wrong
# without them.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """``text`` with each hidden character written as its code point, ``<U+202E>``."""
    return HIDDEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def escape(value: Any) -> str:
    """Any value as the content of an element or of a quoted attribute."""
    return html.escape(visible(str(value)))


def json_block(name: str, value: Any) -> str:
    """A data block for the script: JSON in which nothing can end the block or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return f'<script type="application/json" id="{name}">{text}</script>'


def slug(text: str) -> str:
    """A name for files and anchors: at most 80 ASCII letters, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")[:80] or "unnamed"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, what it is sorted by where that is not the text, and a class."""

    text: Any
    order: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """One column's head; ``numeric`` aligns its cells to the right and sorts them by number."""

    label: str
    numeric: bool = False


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell | Any]],
    *,
    sortable: bool = True,
) -> str:
    """A captioned table in a box that scrolls sideways by itself, by keyboard too.

    The first cell of a row is its head. Cells that are no `Cell` are taken as text.
    """
    heads = "".join(
        f'<th scope="col"{_classes("number" if column.numeric else "")}>{escape(column.label)}</th>'
        for column in columns
    )
    body = []
    for row in rows:
        cells = []
        for place, (column, given) in enumerate(zip(columns, row, strict=True)):
            cell = given if isinstance(given, Cell) else Cell(given)
            kinds = " ".join(filter(None, ("number" if column.numeric else "", cell.kind)))
            tag, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
            order = "" if cell.order is None else f' data-order="{cell.order!r}"'
            cells.append(f"<{tag}{scope}{_classes(kinds)}{order}>{escape(cell.text)}</{tag}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    kind = "sortable" if sortable and len(rows) > 1 else "plain"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _classes(names: str) -> str:
    return f' class="{names}"' if names else ""


def note(text: str) -> str:
    """A remark under a heading: what is missing, what was sampled."""
    return f'<p class="note">{escape(text)}</p>'


def section(name: str, title: str, *parts: str) -> str:
    """One section of the page, reached by ``#name``."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n{body}\n</section>'
    )
