"""A summary as Markdown tables that read well in a terminal too."""

from collections.abc import Callable, Sequence
from typing import Any

from montessori_jax.report import lines
from montessori_jax.report.lines import with_error
from montessori_jax.report.summary import Summary

STUDENTS = {
    "untrained": "untrained",
    "untuned": "trained on the untuned teacher's data (Self-Instruct)",
    "tuned": "trained on the tuned teacher's data",
    "seeds": "trained on the seeds",
    "expanded": "trained on seeds and what was written from the hard ones (LLM2LLM)",
}
# Below this the loop runs but learns next to nothing: the paper trains students on 10,000 rows.
DEMONSTRATION_ROWS = 1000


def render(summary: Summary) -> str:
    """The result of every iteration, the students side by side, and the cost of every stage."""
    parts = [f"# {summary['run']}: {summary['described']}", ""]
    parts += [f"Teacher `{summary['teacher']}`, student `{summary['student']}`.", ""]
    rows = 0
    baseline = None
    for iteration in summary["iterations"]:
        stages = iteration["stages"]
        baseline = baseline or (stages.get("evaluate-untrained") or {}).get("reference_loss")
        parts += [f"## Iteration {iteration['iteration']}", ""]
        parts += _table(("what", "result"), _results(stages, summary["tuning_stages"]))
        students = _students(stages, baseline)
        if students:
            parts += ["", "Held-out reference loss of the student, in nats a token:", ""]
            parts += _table(("student", "rows", "loss ± standard error", "change"), students)
        rows = max(rows, *((stages.get(f"train-{name}") or {}).get("rows", 0) for name in STUDENTS))
        parts.append("")
    parts += ["## Cost", ""]
    parts += _table(
        ("stage", "seconds", "tokens", "tokens/s", "peak so far", "attempts"), _costs(summary)
    )
    if rows < DEMONSTRATION_ROWS:
        parts += [
            "",
            f"With {rows} training rows a student this run demonstrates the mechanics, not the "
            "paper's gains: read nothing into the differences between students.",
        ]
    return "\n".join(parts) + "\n"


def _results(stages: dict[str, Any], asked: Sequence[str]) -> list[tuple[str, str]]:
    """A row for each result of the stages that are there, and of those that the method goes to."""
    rows: list[tuple[str, str]] = []

    def add(name: str, label: str, text: Callable[[dict[str, Any]], str]) -> None:
        if name in stages or name in asked:
            result = stages.get(name)
            rows.append((label, "not done yet" if result is None else text(result)))

    add(
        "generate",
        "yield of the teacher",
        lambda r: f"{r['yield']:.0%} ({r['kept']} of {r['candidates']} candidates kept)",
    )
    add("generate", "dropped, by cause", lambda r: _counts(r["dropped"]))
    add("respond", "competing responses", lines.responded)
    for end, of in (("", ""), ("-responses", " of responses")):
        name = f"influence{end}"
        add(name, f"influence{of}", _scored)
        add(name, f"share of positive influence{of}", lambda r: f"{r['positive_share']:.0%}")
        result = stages.get(name) or {}
        if result.get("offset") is not None:
            add(
                name,
                "the same relative to the zero-gradient step",
                lambda r: f"{r['positive_share_relative']:.0%}",
            )
        if result.get("audit"):
            add(name, f"audit by exact influence{of}", lambda r: _audit(r["audit"]))
        add(f"judge{end}", f"judge's scores{of}", lines.judged)
        add(f"losses{end}", f"student's losses{of}", lines.losses_measured)
        add(f"random{end}", f"random scores{of}", lines.drawn)
    for end, of in (("", ""), ("-responses", " of responses")):
        add(f"preferences{end}", f"preference pairs{of}", _pairs)
        add(
            f"preferences{end}",
            f"{'instructions' if of else 'prompts'} that gave no pair",
            lambda r: f"{r['prompts_without']} of {r['prompts']}{_reasons(r['without'])}",
        )
    add("helpful", "helpful candidates", lambda r: f"{r['helpful']} of {r['candidates']}")
    add("bootstrap", "fine-tuning on them", lines.trained)
    add("dpo", "DPO loss", lambda r: f"{r['first_loss']:.4f} -> {r['last_loss']:.4f}")
    if (stages.get("dpo") or {}).get("heldout_after"):
        add("dpo", "held-out reward margin", lambda r: _margin(r))
        add(
            "dpo",
            "held-out reward accuracy",
            lambda r: f"{r['heldout_after']['reward_accuracy']:.0%}",
        )
    add("dpo", "KL to the teacher before, last step, nats a token", lambda r: f"{r['kl']:.4f}")
    add(
        "similarity",
        "tuned teacher's texts that differ under equal seeds",
        lambda r: (
            f"{r['changed_share']:.0%} of {r['compared']} (mean edit distance "
            f"{r['edit_distance']:.2f})"
        ),
    )
    return rows


def _scored(r: dict[str, Any]) -> str:
    scored = f"{r['scored']} scored by {r['method']} on {r['references']} references"
    return f"{scored}, {r['null']} not{_reasons(r['reasons'])}"


def _pairs(r: dict[str, Any]) -> str:
    use = f"{r['training']} to train on, {r['heldout']} held out"
    return f"{r['pairs']} by rule '{r['rule']}' ({use})"


def _students(stages: dict[str, Any], baseline: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """``baseline`` is the untrained student's loss, measured in the first iteration."""
    rows: list[tuple[str, ...]] = []
    for name, label in STUDENTS.items():
        result = stages.get(f"evaluate-{name}")
        loss = (result or {}).get("reference_loss")
        if loss is None:
            continue
        trained = stages.get(f"train-{name}") or {}
        change = f"{loss['loss'] - baseline['loss']:+.4f}" if baseline and trained else ""
        rows.append(
            (
                label,
                str(trained.get("rows", 0)),
                with_error(loss, 4),
                change,
            )
        )
    return rows


def _costs(summary: Summary) -> list[tuple[str, ...]]:
    rows = []
    total = 0.0
    for row in summary["costs"]:
        total += row["seconds"]
        tokens = sum(number for kind, number in row.items() if kind.endswith("_tokens"))
        rows.append(
            (
                row["stage"],
                f"{row['seconds']:.1f}",
                f"{tokens:,}" if tokens else "",
                f"{tokens / row['seconds']:.0f}" if tokens else "",
                f"{row['peak_memory_bytes'] / 2**30:.1f} GiB",
                str(row["attempts"]),
            )
        )
    return [*rows, ("total", f"{total:.1f}", "", "", "", "")]


def _audit(audit: dict[str, Any]) -> str:
    found = audit["agreement"]
    error = found["error"]
    parts = [f"{found['count']} scores"]
    if found["spearman"] is not None:
        parts.append(f"Spearman {found['spearman']:.3f}")
    if found["pairs"] and found["pairs"]["jaccard"] is not None:
        parts.append(f"pairs {found['pairs']['jaccard']:.2f}")
    if error is not None:
        parts.append(f"normalised error {error['total']:.3f}")
    return ", ".join(parts)


def _margin(dpo: dict[str, Any]) -> str:
    before, after = dpo["heldout_before"], dpo["heldout_after"]
    return f"{before['reward_margin']:+.4f} -> {after['reward_margin']:+.4f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items() if number) or "none"


def _reasons(counts: dict[str, int]) -> str:
    return f": {_counts(counts)}" if counts else ""


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return [line(head), line(["-" * width for width in widths]), *map(line, body)]
