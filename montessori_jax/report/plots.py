"""The figures of the page, each from plain numbers."""

from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from montessori_jax.report.drawing import Figure, axis_label, colour, label
from montessori_jax.report.lengths import Lengths
from montessori_jax.report.markup import slug
from montessori_jax.report.measured import Row, WinRate, win_rates
from montessori_jax.report.verbs import RootVerbs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Below and above these shares of values an axis ends: one outlier would flatten all the others.
TAILS = (0.002, 0.998)


# Tasks whose time is drawn, the longest ones.
MOST_TASKS = 12


def _legend(axes: "Axes") -> None:
    """Above the axes, where it hides nothing."""
    names = axes.get_legend_handles_labels()[1]
    if not names:  # all are empty
        return
    short = max(map(len, names)) <= 20
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(names), 2 if short else 1))


def forest(name: str, title: str, rows: Sequence[tuple[str, float, float | None]]) -> Figure:
    """One measure with its 95% intervals (1.96 standard errors), a line a student."""

    def draw(axes: "Axes") -> None:
        places = np.arange(len(rows))[::-1]
        for place, (_, value, error) in zip(places, rows, strict=True):
            wide = None if error is None else [1.96 * error]
            axes.errorbar(
                [value], [place], xerr=wide, fmt="o", color=colour(0), capsize=3, markersize=5
            )
        axes.set_yticks(places, [label(text) for text, _, _ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x")
        axes.set_xlabel(axis_label(title))

    caption = "Each student, with 95% intervals where a standard error is known."
    return Figure(f"students-{slug(name)}", title, caption, draw, 0.9 + 0.28 * len(rows))


def influence(sets: Mapping[str, tuple[np.ndarray, float | None]]) -> Figure:
    """Distributions of influence; the zero-gradient step's, which all share, as a dashed line."""

    def draw(axes: "Axes") -> None:
        everything = np.concatenate([values for values, _ in sets.values()])
        low, high = np.quantile(everything, TAILS)
        edges = list(np.linspace(min(low, 0.0), max(high, 0.0), 41))
        if edges[0] == edges[-1]:
            edges = list(np.linspace(edges[0] - 0.5, edges[0] + 0.5, 41))
        for number, (name, (values, offset)) in enumerate(sets.items()):
            inside = np.clip(values, edges[0], edges[-1])
            share = np.full(len(values), 1 / len(values))
            axes.hist(
                inside, edges, weights=share, histtype="stepfilled", alpha=0.35,
                color=colour(number), label=label(name),
            )  # fmt: skip
            if offset is not None and edges[0] <= offset <= edges[-1]:
                axes.axvline(offset, color=colour(number), linestyle="--", linewidth=1)
        axes.axvline(0, color=colour("ink"), linewidth=1)
        axes.set_xlabel("influence, nats (positive helps)")
        axes.set_ylabel("share of samples")
        _legend(axes)

    return Figure(
        "influence",
        "Local data influence of the probed samples",
        "The outermost bars hold all that lies beyond. Dashed: the step with a zero gradient, "
        "which all samples share.",
        draw,
    )


def audit(name: str, method: str, scores: Sequence[Mapping[str, Any]]) -> Figure:
    """Audited estimates against exact influence, with the line on which both are equal."""

    def draw(axes: "Axes") -> None:
        truth = [one["truth"] for one in scores]
        estimate = [one["estimate"] for one in scores]
        ends = [min(truth + estimate), max(truth + estimate)]
        axes.plot(ends, ends, color=colour("muted"), linewidth=1, linestyle="--")
        axes.scatter(truth, estimate, s=18, color=colour(0), alpha=0.8, linewidths=0)
        axes.grid()
        axes.set_xlabel("exact influence, nats")
        axes.set_ylabel(axis_label(f"{method}, nats"))

    caption = f"{name}: {len(scores)} audited samples; on the dashed line both are equal."
    return Figure(f"audit-{slug(name)}-{slug(method)}", f"Audit of {method}", caption, draw)


def lengths(kind: str, name: str, sets: Mapping[str, Lengths]) -> Figure:
    """Distributions of lengths (``kind``: instructions or responses), one line a data set."""

    def draw(axes: "Axes") -> None:
        counts = {name: getattr(found, kind) for name, found in sets.items()}
        top = max(float(np.quantile(one, TAILS[1])) for one in counts.values() if len(one))
        edges = np.unique(np.linspace(0, max(top, 1), 33).round()).tolist()
        for number, (title, values) in enumerate(counts.items()):
            axes.hist(
                np.minimum(values, edges[-1]), edges, histtype="step", linewidth=1.6,
                weights=np.full(len(values), 1 / max(len(values), 1)),
                color=colour(number), label=f"{label(title)} (median {np.median(values):.0f})",
            )  # fmt: skip
        axes.set_xlabel(" or ".join(sorted({found.unit for found in sets.values()})))
        axes.set_ylabel(f"share of {kind}")
        _legend(axes)

    caption = f"{name}. The last bin holds all that is longer."
    return Figure(
        f"lengths-{kind}-{slug(name)}", f"Length of {kind}", caption, draw, _tall(2.9, sets)
    )


def _tall(height: float, sets: Sized) -> float:
    """A figure's height in inches where its legend has a line for each of ``sets``."""
    return height + 0.17 * max(0, len(sets) - 2)


def root_verbs(name: str, sets: Mapping[str, RootVerbs], most: int = 15) -> Figure:
    """The most frequent root verbs, a bar a data set, with the nouns that they act on beside."""
    together = sum((found.verbs for found in sets.values()), start=type(_any(sets).verbs)())
    verbs = [verb for verb, _ in together.most_common(most)]
    nouns = sum((found.nouns for found in sets.values()), start=type(_any(sets).nouns)())

    def draw(axes: "Axes") -> None:
        thick = 0.8 / len(sets)
        for number, (title, found) in enumerate(sets.items()):
            places = np.arange(len(verbs))[::-1] + (len(sets) - 1) * thick / 2 - number * thick
            share = [found.verbs[verb] / max(found.parsed, 1) for verb in verbs]
            axes.barh(places, share, thick, color=colour(number), label=label(title))
        longest = max(
            found.verbs[verb] / max(found.parsed, 1) for found in sets.values() for verb in verbs
        )
        for place, verb in zip(np.arange(len(verbs))[::-1], verbs, strict=True):
            mine = [noun for (of, noun), _ in nouns.most_common() if of == verb][:4]
            reach = max(found.verbs[verb] / max(found.parsed, 1) for found in sets.values())
            axes.text(
                reach + 0.02 * longest, place, label(", ".join(mine), 34), va="center",
                fontsize=8.5, color=colour("muted"),
            )  # fmt: skip
        axes.set_yticks(np.arange(len(verbs))[::-1], [label(verb, 20) for verb in verbs])
        axes.set_xlim(0, longest * 1.9)
        axes.set_xlabel("share of instructions")
        _legend(axes)

    counts = ", ".join(
        f"{sum(found.verbs.values())} of {found.parsed} instructions of {title}"
        for title, found in sets.items()
    )
    caption = (
        f"{name}. Beside each bar its most frequent objects. A root verb is found in {counts}."
    )
    return Figure(
        f"verbs-{slug(name)}",
        "Root verbs and their nouns",
        caption,
        draw,
        _tall(0.8 + max(0.25, 0.08 * len(sets)) * len(verbs), sets),
    )


def _any(sets: Mapping[str, RootVerbs]) -> RootVerbs:
    return next(iter(sets.values()))


def curve(
    name: str, title: str, x_label: str, y_label: str, sets: Mapping[str, Sequence[Row]],
    key: str, *, beside: tuple[str, str] = ("", ""),
) -> Figure:  # fmt: skip
    """Lines over steps, with 95% intervals where rows have ``KEY_error`` (a standard error).

    ``beside`` is the key of a dashed line in the same colour, and what the legend adds to its name.
    """

    def draw(axes: "Axes") -> None:
        for number, (title_, rows) in enumerate(sets.items()):
            x, y = _over_steps(rows, key)
            axes.plot(x, y, marker="o", markersize=3.5, color=colour(number), label=label(title_))
            error = _over_steps(rows, key, f"{key}_error")[1]
            if error.any():
                axes.fill_between(
                    x,
                    y - 1.96 * error,
                    y + 1.96 * error,
                    color=colour(number),
                    alpha=0.18,
                    linewidth=0,
                )
            x, y = _over_steps(rows, beside[0])
            if len(x):
                axes.plot(
                    x, y, marker="o", markersize=3.5, color=colour(number), linestyle="--",
                    label=label(f"{label(title_)}{beside[1]}", 64),
                )  # fmt: skip
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        axes.set_ylabel(axis_label(y_label))
        if len(axes.lines) > 1:
            _legend(axes)

    return Figure(name, title, "", draw)


def _over_steps(
    rows: Sequence[Row], key: str, value: str = ""
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Steps of the rows that have ``key``, in order, and there ``value`` (0 where it is missing),
    by default ``key`` itself."""
    known = sorted((row for row in rows if row.get(key) is not None), key=lambda row: row["step"])
    steps = np.array([row["step"] for row in known], float)
    return steps, np.array([row.get(value or key) or 0.0 for row in known], float)


def quantiles(sets: Mapping[str, Sequence[Row]]) -> Figure:
    """The median of influence along DPO, half of all values round it, and nine tenths of them."""

    def draw(axes: "Axes") -> None:
        for number, (title, rows) in enumerate(sets.items()):
            known = [row for row in rows if row.get("influence_quantiles")]
            known.sort(key=lambda row: row["step"])
            x = [row["step"] for row in known]
            ends = zip(*(row["influence_quantiles"] for row in known), strict=True)
            lowest, low, middle, high, highest = (np.array(one, float) for one in ends)
            tint = colour(number)
            axes.plot(x, middle, marker="o", markersize=3.5, color=tint, label=label(title))
            axes.fill_between(x, low, high, color=tint, alpha=0.18, linewidth=0)
            for end in (lowest, highest):
                axes.plot(x, end, color=tint, linewidth=0.7)
        axes.axhline(0, color=colour("ink"), linewidth=0.7)
        axes.grid(axis="y")
        axes.set_xlabel("DPO step")
        axes.set_ylabel("influence, nats (positive helps)")
        if len(sets) > 1:
            _legend(axes)

    caption = "The median, a band from 25% to 75% of its data, thin lines at 5% and 95%."
    title = "Distribution of influence of the teacher's data"
    return Figure("teacher-influence-quantiles", title, caption, draw)


def matrix(name: str, rows: Sequence[Row]) -> Figure:
    """Win rates of each row's player against each column's."""
    found = win_rates(rows)
    players = list(dict.fromkeys(player for pair in found for player in pair))
    size = len(players)

    def cell(axes: "Axes", column: int, line: int, one: WinRate) -> None:
        from matplotlib.patches import Rectangle

        shade = 0.06 + 0.5 * min(2 * abs(one.rate - 0.5), 1)
        side = colour(0 if one.rate >= 0.5 else 1)
        axes.add_patch(Rectangle((column, line), 1, 1, facecolor=side, alpha=shade, linewidth=0))
        error = "" if one.error is None else f" ± {100 * one.error:.0f}"
        text = f"{100 * one.rate:.0f}{error}%"
        axes.text(column + 0.5, line + 0.5, text, ha="center", va="center", color=colour("ink"))

    def draw(axes: "Axes") -> None:
        for (player, other), one in found.items():
            cell(axes, players.index(other), size - 1 - players.index(player), one)
        axes.set_xlim(0, size)
        axes.set_ylim(0, size)
        middle = np.arange(size) + 0.5
        axes.set_xticks(middle, [label(one, 26) for one in players], rotation=30, ha="right")
        axes.set_yticks(middle[::-1], [label(one, 24) for one in players])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    games = sorted(one.games for one in found.values())
    played = f"{games[0]} to {games[-1]}" if games[0] < games[-1] else f"{games[0]}"
    caption = (
        f"{name}: share of prompts on which the row's model beats the column's, ties as half, with "
        f"standard errors where known; {played} prompts a pair."
    )
    return Figure(f"win-rates-{slug(name)}", "Win rates", caption, draw, 1.9 + 0.42 * size)


def cross_student(
    name: str, metric: str, rows: Sequence[tuple[str, str, float, float | None]]
) -> Figure:
    """Bars of one metric: students side by side, a bar for each data set that they learned from.

    ``rows`` are student, data set, value and standard error.
    """
    students = list(dict.fromkeys(row[0] for row in rows))
    data = list(dict.fromkeys(row[1] for row in rows))

    def draw(axes: "Axes") -> None:
        thick = 0.8 / len(data)
        for number, source in enumerate(data):
            mine = [row for row in rows if row[1] == source]
            shift = (number - (len(data) - 1) / 2) * thick
            axes.bar(
                [students.index(student) + shift for student, *_ in mine],
                [value for _, _, value, _ in mine],
                thick * 0.92,
                yerr=[1.96 * (error or 0.0) for *_, error in mine],
                capsize=2,
                color=colour(number),
                ecolor=colour("ink"),
                label=label(source),
            )
        axes.set_xticks(range(len(students)), [label(one, 18) for one in students])
        axes.set_ylabel(axis_label(metric))
        axes.grid(axis="y")
        _legend(axes)

    return Figure(
        f"cross-student-{slug(name)}-{slug(metric)}",
        f"Across students: {metric}",
        f"{name}: students that learned from the data of one teacher, with 95% intervals where a "
        "standard error is known.",
        draw,
    )


def seconds(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """Seconds of each task, a bar a run."""
    total: dict[str, float] = {}
    for _, of in rows:
        for task, spent in of.items():
            total[task] = total.get(task, 0.0) + spent
    longest = sorted(total, key=lambda task: -total[task])[:MOST_TASKS]
    tasks = [task for task in total if task in longest]

    def draw(axes: "Axes") -> None:
        thick = 0.8 / len(rows)
        for number, (name, of) in enumerate(rows):
            places = np.arange(len(tasks))[::-1] + (len(rows) - 1) * thick / 2 - number * thick
            values = [of.get(task, 0.0) for task in tasks]
            axes.barh(places, values, thick, color=colour(number), label=label(name))
        axes.set_yticks(np.arange(len(tasks))[::-1], tasks)
        axes.grid(axis="x")
        axes.set_xlabel("seconds")
        if len(rows) > 1:
            _legend(axes)

    caption = "All iterations and attempts together."
    if len(tasks) < len(total):
        caption += f" The {len(tasks)} longest tasks of {len(total)}."
    height = 0.9 + max(0.22, 0.09 * len(rows)) * len(tasks)
    return Figure("cost", "Time by task", caption, draw, height)
