"""A figure drawn once: as files (SVG, PNG) in fixed colours, and inline in the page's colours."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from montessori_jax.report.markup import escape, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours on white; inline each becomes the variable of the same name, which the page sets for
# light and for dark. Told apart with each kind of colour blindness (after Okabe and Ito).
COLOURS = {
    "ink": "#1d2530",
    "muted": "#5a6575",
    "grid": "#dfe3ea",
    "paper": "#fefefe",
    "series-1": "#1f66ad",
    "series-2": "#b84f08",
    "series-3": "#1b7a5a",
    "series-4": "#86469c",
    "series-5": "#8a6d00",
    "series-6": "#5b6b7b",
}
SERIES = [f"series-{number}" for number in range(1, 7)]
WIDTH = 4.5  # inches: at this size text is legible on a phone without enlarging
ATTRIBUTES = re.compile(r' style="([^"]*)"')
FONT = re.compile(r"font-family: [^;\"]*;?")


def colour(name: str | int) -> str:
    """A colour by its name, or that of a series by its number from 0."""
    return COLOURS[SERIES[name % len(SERIES)] if isinstance(name, int) else name]


def label(text: object, longest: int = 40) -> str:
    """A text as it may be drawn: hidden characters visible, in one line, not too long."""
    plain = " ".join(visible(str(text)).split())
    if plain.startswith("_"):  # which to matplotlib means: not in the legend
        plain = f" {plain}"
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def axis_label(text: object, width: int = 38) -> str:
    """A text as an axis may be called: in lines, without what is in brackets where it is long.

    The caption has the whole.
    """
    plain = label(text, 240)
    if len(plain) > width:
        plain = plain.partition(" (")[0]
    return "\n".join(textwrap.wrap(plain, width))


@dataclass(frozen=True)
class Figure:
    """One figure: what it is called, what it shows in words, and how it is drawn on axes."""

    name: str
    title: str
    caption: str
    draw: Callable[["Axes"], None]
    height: float = 2.9

    def renamed(self, name: str) -> "Figure":
        """The same under another name."""
        return replace(self, name=name)

    def inline(self, folder: Path | None) -> str:
        """As HTML, an SVG in the page's own colours; its files are written to ``folder``."""
        svg = self._render(folder)
        inner = svg[svg.index("<svg") :]
        inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.S)
        inner = re.sub(r'<g id="[^"]*">', "<g>", inner)
        inner = ATTRIBUTES.sub(_attributes, inner)
        for name, value in COLOURS.items():
            inner = inner.replace(f'"{value}"', f'"var(--{name})"')
        head = re.match(r"<svg[^>]*>", inner)
        assert head is not None
        box = re.search(r'viewBox="[^"]*"', head[0])
        assert box is not None
        inner = re.sub(r"\n\s*", " ", inner[head.end() :])
        return (
            f'<figure id="figure-{self.name}"><figcaption><strong>{escape(self.title)}</strong> '
            f"{escape(self.caption)}</figcaption>"
            f'<svg role="img" aria-label="{escape(f"{self.title}. {self.caption}")}" {box[0]} '
            'xmlns:xlink="http://www.w3.org/1999/xlink" stroke-linejoin="round">'
            f"{inner}</figure>"
        )

    def _render(self, folder: Path | None) -> str:
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        style: Any = {  # matplotlib types each key by its name
            "svg.fonttype": "none",
            "svg.hashsalt": self.name,
            "text.parse_math": False,
            "font.size": 9.5,
            "axes.edgecolor": colour("muted"),
            "axes.labelcolor": colour("muted"),
            "axes.linewidth": 0.7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.facecolor": colour("paper"),
            "figure.facecolor": colour("paper"),
            "text.color": colour("ink"),
            "xtick.color": colour("muted"),
            "ytick.color": colour("muted"),
            "grid.color": colour("grid"),
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "axes.unicode_minus": True,
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
        with matplotlib.rc_context(style), warnings.catch_warnings():
            # Letters that the file's font lacks: the page and viewers of SVG have other fonts.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            canvas = Canvas(figsize=(WIDTH, self.height), layout="constrained")
            self.draw(canvas.subplots())
            svg = io.StringIO()
            canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{self.name}.svg").write_text(svg.getvalue(), encoding="utf-8")
                canvas.savefig(folder / f"{self.name}.png", dpi=200)
        return svg.getvalue()


def _attributes(found: re.Match[str]) -> str:
    """``style="a: b"`` as attributes: the page's policy allows no inline style."""
    rules = (rule.partition(":") for rule in FONT.sub("", found[1]).split(";") if rule.strip())
    return "".join(f' {name.strip()}="{value.strip()}"' for name, _, value in rules)
