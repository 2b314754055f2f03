"""Stage: local data influence of every candidate, one row each, in order; positive helps.

Writes the scores and, when asked, an audit of them by the definition. Resumes chunk by chunk.
"""

import math
from pathlib import Path
from typing import Any

from montessori_jax.config import InfluenceConfig, as_dict
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.encode import encode_each, encode_rows
from montessori_jax.data.overlap import warn_about_overlaps
from montessori_jax.data.rows import read_rows
from montessori_jax.data.writing import write_jsonl, write_parquet
from montessori_jax.errors import UserError
from montessori_jax.influence import Score, audit_scores, score_candidates
from montessori_jax.runs import Journal, value_hash
from montessori_jax.stages.student import open_student
from montessori_jax.training.optimizer import probe_optimizer
from montessori_jax.work import Work


def influence(
    student: str,
    candidates: str,
    reference: str,
    settings: InfluenceConfig,
    work: Work,
    *,
    num_reference: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score ``candidates`` on ``student`` against the first ``num_reference`` reference rows.

    A candidate that cannot be scored has ``influence`` null and a ``reason``.

    Returns:
        Counts, the share of positive scores, the shared step's part and the audit.

    Raises:
        UserError: an input is missing or has no usable row, or the reference loss is not finite.
    """
    out = work.file("scores.parquet") if out is None else out
    probe = open_student(student, settings)
    if not probe.warm and settings.optimizer == "adamw":
        work.say(
            f"warning: {student} has a fresh AdamW state: its first step moves every weight by the "
            "sign of its gradient; warm it up (--warmup FILE), or give --optimizer sgd"
        )
    loaded = probe.loaded
    chat = ChatFormat.of(loaded)
    source = read_rows(candidates)
    chats, reasons = encode_each(source, chat)
    known = read_rows(reference)
    for warning in warn_about_overlaps(known.require()[:num_reference]):
        work.say(f"warning: {warning}")
    references = encode_rows(known, chat, settings.max_length, limit=num_reference)
    ids = [row.id for row in source.rows]
    key = {
        "student": probe.loaded.fingerprint if not probe.warm else _identity(student),
        "candidates": value_hash([[row.id, row.conversation()] for row in source.rows]),
        "reference": value_hash([row.conversation() for row in references.rows]),
        "settings": {k: v for k, v in as_dict(settings).items() if k != "audit"},
    }
    journal = Journal(work.file("chunks.jsonl"), key)
    finished = {record["chunk"] for record in journal.records}
    parameters = loaded.model.parameter_count()
    usable = [i for i in range(len(ids)) if i not in reasons]
    tokens = {i: len(chats[i].tokens) for i in usable}
    done = sum(len(record["scores"]) for record in journal.records)
    tx = probe_optimizer(probe.settings, probe.learning_rate)
    with work.bar(len(usable), "candidate", settings.method, done=done) as bar:

        def on_chunk(number: int, scores: list[Score]) -> None:
            journal.append({"chunk": number, "scores": [score.as_row() for score in scores]})
            start = number * settings.chunk
            scored = sum(tokens[i] for i in usable[start : start + len(scores)])
            passes = 2.0 * references.tokens * len(scores) if settings.method == "exact" else 0.0
            work.meter.count(probed_tokens=scored, flops=parameters * (6.0 * scored + passes))
            bar.update(len(scores))
            work.stop.check()

        score_candidates(
            loaded.model,
            loaded.params,
            probe.state.opt_state,
            tx,
            [chats[i] for i in usable],
            references.chats,
            settings,
            ids=[ids[i] for i in usable],
            finished=finished,
            on_chunk=on_chunk,
        )
    found = {
        row["id"]: row
        for record in sorted(journal.records, key=lambda record: record["chunk"])
        for row in record["scores"]
    }
    checked = None
    if settings.audit and settings.method != "exact":
        work.say(f"measuring {settings.audit} scores again by the definition")
        found_audit = audit_scores(
            loaded.model,
            loaded.params,
            probe.state.opt_state,
            tx,
            [chats[i] for i in usable],
            references.chats,
            settings,
            [Score(**found[ids[i]]) for i in usable],
            seed=work.seed,
        )
        checked = None if found_audit is None else found_audit.as_row()
    reasons_by_index = {bad.index: bad.reason for bad in source.bad}
    names = {bad.index: bad.id for bad in source.bad} | {row.index: row.id for row in source.rows}
    reasons_by_index |= {source.rows[i].index: reason for i, reason in reasons.items()}
    rows = [
        _row(index, names[index], found.get(names[index]), reasons_by_index.get(index))
        for index in sorted(names)
    ]
    write_scores(out, rows)
    values = [row["influence"] for row in rows if row["influence"] is not None]
    if not values:
        causes = {row["reason"] for row in rows}
        raise UserError(
            f"{candidates}: no candidate could be scored: {'; '.join(map(str, causes))}"
        )
    nulls: dict[str, int] = {}
    for row in rows:
        if row["influence"] is None:
            nulls[row["reason"]] = nulls.get(row["reason"], 0) + 1
    offsets = [row["offset"] for row in rows if row["offset"] is not None]
    mean = sum(values) / len(values)
    return {
        "scored": len(values),
        "null": len(rows) - len(values),
        "reasons": nulls,
        "references": len(references.chats),
        "method": settings.method,
        "learning_rate": probe.learning_rate,
        "positive_share": sum(value > 0 for value in values) / len(values),
        "positive_share_relative": (
            sum(v > offsets[0] for v in values) / len(values) if offsets else None
        ),
        "mean": mean,
        "spread": math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)),
        "offset": offsets[0] if offsets else None,
        "audit": checked,
    }


def audit_line(audit: dict[str, Any] | None) -> str:
    """The audit in a few words, behind a comma; nothing without one."""
    if not audit:
        return ""
    found = audit["agreement"]
    parts = [f", audit of {found['count']} by exact"]
    if found["spearman"] is not None:
        parts.append(f"Spearman {found['spearman']:.3f}")
    if found["error"] is not None:
        parts.append(f"normalised error {found['error']['total']:.3f}")
    return ": ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else parts[0]


def _identity(student: str) -> str:
    from montessori_jax.training.checkpoints import state_identity

    return state_identity(Path(student))


def _row(index: int, id: str, score: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    score = score or {}
    return {
        "index": index,
        "id": id,
        "influence": score.get("influence"),
        "reference_loss_before": score.get("loss_before"),
        "reference_loss_after": score.get("loss_after"),
        "offset": score.get("offset"),
        "standard_error": score.get("standard_error"),
        "candidate_loss": score.get("candidate_loss"),
        "estimator": score.get("method"),
        "reason": reason or score.get("reason"),
    }


def check_suffix(path: Path) -> None:
    """Raises `UserError` for a name that scores cannot be written under."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: scores are written as .jsonl or .parquet: give such a name")


def write_scores(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write score rows as JSON lines or Parquet, by the name's suffix."""
    check_suffix(path)
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        write_parquet(path, rows)
