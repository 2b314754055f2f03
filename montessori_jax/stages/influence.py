"""Stage: local data influence of every candidate, one row each, in order; positive helps.

Writes the scores and, when asked, an audit of them by the definition. Resumes chunk by chunk.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from montessori_jax.config import InfluenceConfig, as_dict
from montessori_jax.data.chat import ChatFormat, EncodedChat
from montessori_jax.data.encode import EncodedRows, encode_each, encode_rows
from montessori_jax.data.overlap import warn_about_overlaps
from montessori_jax.data.rows import Row, RowFile, read_rows
from montessori_jax.data.writing import (
    DatasetCard,
    write_dataset_parts,
    write_jsonl,
    write_parquet,
)
from montessori_jax.errors import UserError
from montessori_jax.influence import Score, audit_scores, score_candidates
from montessori_jax.runs import Journal, value_hash
from montessori_jax.stages.student import ProbeStudent, open_student
from montessori_jax.stages.trained import step_flops
from montessori_jax.work import Work

COLUMNS = {
    "index": "the candidate's place in its file, from 0",
    "id": "the candidate's name",
    "influence": "reference loss before minus after one step on the candidate, in nats; positive "
    "helps; null where it could not be measured",
    "reference_loss_before": "nats a response token, of the student as it is",
    "reference_loss_after": "the same after the step, where the estimator measures it",
    "offset": "influence of the step with a zero gradient, which all candidates share",
    "standard_error": "of the influence, where the estimator samples",
    "candidate_loss": "the student's loss on the candidate before the step, in nats a token",
    "estimator": "how the influence was measured",
    "reason": "why there is none",
}


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

    Args:
        student: a warmed-up student's folder, or the name of a model.
        candidates: rows to score.
        reference: rows that influence is measured on.
        settings: method, probe step and numerics.
        work: where to write.
        num_reference: how many of the reference rows are used, the first ones; all by default.
        out: the scores' file; by default the data set ``scores.parquet`` with a card in the
            stage's folder.

    Returns:
        Counts, the share of positive scores, the shared step's part and the audit.

    Raises:
        UserError: an input is missing or has no usable row, or the reference loss is not finite.
    """
    probe = open_student(student, settings)
    if not probe.warm and settings.optimizer == "adamw":
        work.say(
            f"warning: {student} has a fresh AdamW state: its first step moves every weight by the "
            "sign of its gradient; warm it up (--warmup FILE), or give --optimizer sgd"
        )
    chat = ChatFormat.of(probe.loaded)
    source, known = read_rows(candidates), read_rows(reference)
    for warning in warn_about_overlaps(known.require()[:num_reference]):
        work.say(f"warning: {warning}")
    rows, chats, reasons = encode_each(source, chat)
    references = encode_rows(known, chat, settings.max_length, limit=num_reference)
    key = {
        "student": probe.fingerprint,
        "candidates": value_hash([[row.id, row.conversation()] for row in rows]),
        "reference": value_hash([row.conversation() for row in references.rows]),
        "settings": {k: v for k, v in as_dict(settings).items() if k != "audit"},
    }
    journal = Journal(work.file("chunks.jsonl"), key)
    scores = _score(probe, rows, chats, references, settings, journal, work)
    checked = None
    if settings.audit and settings.method != "exact":
        work.say(f"measuring {settings.audit} scores again by the definition")
        checked = audit_scores(
            probe.loaded.model,
            probe.loaded.params,
            probe.state.opt_state,
            probe.tx,
            chats,
            references.chats,
            settings,
            scores,
            seed=work.seed,
        )
        if checked is not None:
            mean = float(np.mean([len(one.tokens) for one in chats]))
            work.meter.count(
                flops=probe.loaded.model.parameter_count()
                * (2.0 * references.tokens + checked.count * (6.0 * mean + 2.0 * references.tokens))
            )
    table = _table(source, rows, scores, reasons)
    if out is None:
        card = _card(settings, probe, len(references.chats), work.seed)
        write_dataset_parts(work.folder, {"scores": table}, card)
    else:
        write_scores(out, table)
    return {
        **_counts(table, candidates),
        "references": len(references.chats),
        "method": settings.method,
        "learning_rate": probe.learning_rate,
        "audit": None if checked is None else checked.as_row(),
    }


def _score(
    probe: ProbeStudent,
    rows: Sequence[Row],
    chats: Sequence[EncodedChat],
    references: EncodedRows,
    settings: InfluenceConfig,
    journal: Journal,
    work: Work,
) -> list[Score]:
    """All scores in order, those of finished chunks from the journal."""
    parameters = probe.loaded.model.parameter_count()
    # Two forward passes for the loss before and the shared step, and first order's one gradient.
    before = 4.0 * references.tokens + 6.0 * references.tokens * (settings.method != "exact")
    gradient = step_flops(probe.loaded.model)
    work.meter.count(flops=parameters * before)
    done = sum(len(record["scores"]) for record in journal.records)
    with work.bar(len(rows), "candidate", settings.method, done=done) as bar:

        def on_chunk(number: int, scores: Sequence[Score]) -> None:
            journal.append({"chunk": number, "scores": [score.as_row() for score in scores]})
            start = number * settings.chunk
            probed = sum(len(chat.tokens) for chat in chats[start : start + len(scores)])
            passes = 2.0 * references.tokens * len(scores) if settings.method == "exact" else 0.0
            work.meter.count(probed_tokens=probed, flops=gradient * probed + parameters * passes)
            bar.update(len(scores))
            work.stop.check()

        score_candidates(
            probe.loaded.model,
            probe.loaded.params,
            probe.state.opt_state,
            probe.tx,
            chats,
            references.chats,
            settings,
            ids=[row.id for row in rows],
            finished={record["chunk"] for record in journal.records},
            on_chunk=on_chunk,
        )
    in_order = sorted(journal.records, key=lambda record: record["chunk"])
    return [Score(**row) for record in in_order for row in record["scores"]]


def _table(
    source: RowFile, rows: Sequence[Row], scores: Sequence[Score], reasons: dict[int, str]
) -> list[dict[str, Any]]:
    """One row a candidate, in the file's order."""
    scored = {row.index: score for row, score in zip(rows, scores, strict=True)}
    names = {row.index: row.id for row in source.rows} | {bad.index: bad.id for bad in source.bad}
    table = []
    for index in sorted(names):
        score = scored.get(index)
        table.append(
            {
                "index": index,
                "id": names[index],
                "influence": score.influence if score else None,
                "reference_loss_before": score.loss_before if score else None,
                "reference_loss_after": score.loss_after if score else None,
                "offset": score.offset if score else None,
                "standard_error": score.standard_error if score else None,
                "candidate_loss": score.candidate_loss if score else None,
                "estimator": score.method if score else None,
                "reason": score.reason if score else reasons[index],
            }
        )
    return table


def _card(
    settings: InfluenceConfig, probe: ProbeStudent, references: int, seed: int
) -> DatasetCard:
    return DatasetCard(
        title="Local data influence of candidates on a student",
        description="How much one optimizer step on each candidate alone lowers a student's loss "
        "on a reference set (arXiv 2410.14208).",
        columns=COLUMNS,
        made=(
            f"a probe step of {settings.optimizer} at learning rate {probe.learning_rate:.4g} on "
            "each candidate",
            f"influence by the estimator '{settings.method}' on {references} reference rows",
        ),
        counts={"reference rows": references},
        seed=seed,
        models={"student": probe.loaded.name},
    )


def _counts(table: Sequence[dict[str, Any]], candidates: str) -> dict[str, Any]:
    values = np.array([row["influence"] for row in table if row["influence"] is not None])
    nulls = Counter(row["reason"] for row in table if row["influence"] is None)
    if not len(values):
        causes = "; ".join(f"{reason} ({count})" for reason, count in nulls.items())
        raise UserError(f"{candidates}: no candidate could be scored: {causes}")
    offset = next((row["offset"] for row in table if row["offset"] is not None), None)
    relative = None if offset is None else float(np.mean(values > offset))
    return {
        "scored": len(values),
        "null": len(table) - len(values),
        "reasons": dict(nulls),
        "positive_share": float(np.mean(values > 0)),
        "positive_share_relative": relative,
        "mean": float(np.mean(values)),
        "spread": float(np.std(values)),
        "offset": offset,
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
