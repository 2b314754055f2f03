"""Stage: local data influence of every candidate, one row each, in order; positive helps.

Chooses or audits the estimator on a few candidates first, then scores all. Resumes chunk by chunk.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from montessori_jax.config import InfluenceConfig, as_dict
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.encode import EncodedRows, RowsOnDisk, encode_rows, encode_to_disk
from montessori_jax.data.encoded_file import EncodedFile
from montessori_jax.data.overlap import warn_about_overlaps
from montessori_jax.data.own_parts import read_rows_together
from montessori_jax.data.rows import Row
from montessori_jax.data.writing import (
    DatasetCard,
    write_dataset_parts,
    write_jsonl,
    write_parquet,
)
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import UserError
from montessori_jax.influence import Choice, Score, choose_estimator, score_candidates
from montessori_jax.influence.costs import Cost, costs
from montessori_jax.influence.regime import label, resolved, with_method
from montessori_jax.programs import counted_programs
from montessori_jax.runs import FREE_LEAVES, Journal, value_hash
from montessori_jax.stages.student import ProbeStudent, open_student
from montessori_jax.stages.trained import step_flops
from montessori_jax.work import Work

NAMED = re.compile(r"[A-Za-z]\w*=.")
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
    reference: str | Mapping[str, str],
    settings: InfluenceConfig,
    work: Work,
    *,
    num_reference: int | None = None,
    num_candidates: int | None = None,
    out: Path | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Score ``candidates`` on ``student`` against the first ``num_reference`` reference rows.

    A candidate that cannot be scored has ``influence`` null and a ``reason``.

    Args:
        student: a warmed-up student's folder, or the name of a model.
        candidates: rows to score.
        reference: rows that influence is measured on; or several sources by name, of which the
            first gives ``influence`` and each a column ``influence_NAME``.
        settings: method, probe step and numerics.
        work: where to write.
        num_reference: how many of the reference rows are used, the first ones; all by default.
        num_candidates: likewise of the candidates.
        out: the scores' file; by default the data set ``scores.parquet`` with a card in the
            stage's folder.
        mesh: devices that candidates are split over.

    Returns:
        Counts, the share of positive scores, the shared step's part and the audit.

    Raises:
        UserError: an input is missing or has no usable row, or the reference loss is not finite.
    """
    probe = open_student(student, settings, mesh)
    if not probe.warm and settings.optimizer == "adamw":
        work.say(
            f"warning: {student} has a fresh AdamW state: its first step moves every weight by the "
            "sign of its gradient; warm it up (--warmup FILE), or give --optimizer sgd"
        )
    chat = ChatFormat.of(probe.loaded)
    sources = {"reference": reference} if isinstance(reference, str) else reference
    references: dict[str, EncodedRows] = {}
    for name, place in sources.items():
        known = read_rows_together(place)
        for warning in warn_about_overlaps(known.require()[:num_reference]):
            work.say(f"warning: {warning}")
        references[name] = encode_rows(known, chat, settings.max_length, limit=num_reference)
    chunks, longest = work.file("chunks.jsonl"), settings.max_length
    encoded = encode_to_disk(candidates, chat, chunks.parent, limit=num_candidates)
    rows, chats = encoded.rows, encoded.chats
    key = {
        "student": probe.fingerprint,
        "candidates": encoded.content,
        "reference": {
            name: value_hash([row.conversation() for row in known.rows])
            for name, known in references.items()
        },
        "settings": {k: v for k, v in as_dict(settings).items() if k not in FREE_LEAVES},
        "seed": work.seed,
    }
    journal = Journal(chunks, key)
    advice = (
        f"lower influence.block (now {settings.block}), rows_per_pass (now "
        f"{settings.rows_per_pass}) or max_length (now {settings.max_length})"
    )
    with counted_programs() as programs, fits_in_memory("influence", advice):
        choice, audits = _choose(probe, rows, chats, references, settings, journal, work)
        settings = with_method(settings, choice.method)
        scores = _score(probe, rows, chats, references, settings, choice, journal, work)
    if len(chats):
        work.say(
            f"{programs.count} programs compiled in {programs.seconds:.0f} s, for {len(chats)} "
            f"candidates of {chats.lengths.min()} to {chats.lengths.max()} tokens"
        )
    table = _table(encoded, scores)
    if out is None:
        count = sum(len(known.chats) for known in references.values())
        card = _card(settings, probe, count, work.seed)
        write_dataset_parts(work.folder, {"scores": table}, card)
    else:
        write_scores(out, table)
    return {
        **_counts(table, candidates),
        "cut": int(np.sum((chats.prompt_lengths < longest) & (longest < chats.lengths))),
        "references": sum(len(known.chats) for known in references.values()),
        "method": settings.method,
        "learning_rate": probe.learning_rate,
        "audit": next((one for one in audits if one["method"] == settings.method), None),
        "audits": audits,
    }


def _choose(
    probe: ProbeStudent,
    rows: Sequence[Row],
    chats: EncodedFile,
    references: Mapping[str, EncodedRows],
    settings: InfluenceConfig,
    journal: Journal,
    work: Work,
) -> tuple[Choice, list[dict[str, Any]]]:
    """The estimator, and its audits as rows: made once, then read from the journal."""
    for record in journal.records:
        if "choice" in record:
            return Choice(record["choice"]["method"], ()), record["choice"]["audits"]
    known = {
        int(place): Score(**row)
        for record in journal.records
        for place, row in record.get("measured", {}).items()
    }
    with work.bar(0, "candidate", "audit", done=len(known)) as bar:

        def begin(count: int) -> None:
            work.say(f"audit: {count} candidates are measured by the definition first")
            bar.reach(bar.n, count)

        def keep(scores: Mapping[int, Score]) -> None:
            journal.append({"measured": {place: one.as_row() for place, one in scores.items()}})
            bar.update(len(scores))
            work.check_stop()

        found = choose_estimator(
            *probe.probed,
            chats,
            {name: given.chats for name, given in references.items()},
            settings,
            ids=[row.id for row in rows],
            groups=prompts_of(rows),
            seed=work.seed,
            measured=known,
            on_audit=begin,
            on_measured=keep,
        )
    for audit in found.audits:
        work.say(f"audit by exact: {audit.line()}")
        for failure in audit.failures:
            work.say(f"WARNING: {audit.method} FAILED ITS AUDIT: {failure}")
    if settings.method != found.method:
        work.say(f"estimator: {found.method}")
    first = next(iter(references.values()))
    audited = max((audit.count for audit in found.audits), default=0)
    tokens = float(np.mean(chats.lengths)) if len(chats) else 0.0
    prices = costs(probe.loaded.model.parameter_count(), tokens, first.tokens)
    work.meter.count(flops=audited * prices["exact"].each)
    audits = [audit.as_row() for audit in found.audits]
    journal.append({"choice": {"method": found.method, "audits": audits}})
    return found, audits


def prompts_of(rows: Sequence[Row]) -> list[str] | None:
    """Each candidate's prompt; None where the rows do not say."""
    if all(row.prompt_id is None for row in rows):
        return None
    return [row.id if row.prompt_id is None else row.prompt_id for row in rows]


def _score(
    probe: ProbeStudent,
    rows: Sequence[Row],
    chats: EncodedFile,
    references: Mapping[str, EncodedRows],
    settings: InfluenceConfig,
    choice: Choice,
    journal: Journal,
    work: Work,
) -> list[Score]:
    """All scores in order, those of finished chunks from the journal."""
    parameters = probe.loaded.model.parameter_count()
    tokens = sum(known.tokens for known in references.values())

    def cost(candidate_tokens: float) -> Cost:
        return costs(
            parameters,
            candidate_tokens,
            tokens,
            part=settings.control_fraction,
            pilots=min(settings.pilots, len(chats)),
        )[settings.method]

    # What a candidate costs beside its own tokens, and what each of those costs.
    beside = cost(0.0).each
    gradient = step_flops(probe.loaded.model) * (cost(1.0).each - beside) / (6 * parameters)
    finished = [record for record in journal.records if "chunk" in record]
    lengths = chats.lengths
    if not finished:
        work.meter.count(flops=cost(float(lengths.sum()) / max(len(chats), 1)).once)
    done = sum(len(record["scores"]) for record in finished)
    with (
        work.bar(len(rows), "candidate", settings.method, done=done) as bar,
        work.profile(2, 2) as profile,
    ):
        profile.begin(-(-len(chats) // settings.chunk) - len(finished))

        def on_chunk(number: int, scores: Sequence[Score]) -> None:
            journal.append({"chunk": number, "scores": [score.as_row() for score in scores]})
            start = number * settings.chunk
            probed = int(lengths[start : start + len(scores)].sum())
            flops = gradient * probed + beside * len(scores)
            work.meter.count(probed_tokens=probed, flops=flops)
            bar.update(len(scores))
            profile.passed()
            work.check_stop()

        score_candidates(
            *probe.probed,
            chats,
            {name: known.chats for name, known in references.items()},
            settings,
            ids=[row.id for row in rows],
            finished={record["chunk"] for record in finished},
            on_chunk=on_chunk,
            seed=work.seed,
            choice=choice,
        )
    in_order = sorted(
        (record for record in journal.records if "chunk" in record),
        key=lambda record: record["chunk"],
    )
    return [Score(**row) for record in in_order for row in record["scores"]]


def _table(encoded: RowsOnDisk, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """One row a candidate, in the file's order."""
    source = encoded.source
    scored = {row.index: score for row, score in zip(encoded.rows, scores, strict=True)}
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
                "reason": score.reason if score else encoded.reasons[index],
                **{
                    f"{field}_{name}": score.sets[name][field] if score and score.sets else None
                    for name in names_of_sets(scores)
                    for field in ("influence", "offset", "standard_error")
                },
            }
        )
    return table


def names_of_sets(scores: Sequence[Score]) -> list[str]:
    """The reference sets where there are several; one alone has no columns of its own."""
    return next((list(score.sets) for score in scores if score.sets), [])


def reference_sets(given: Sequence[str]) -> str | dict[str, str]:
    """``FILE``, or several ``NAME=FILE``, as `influence` takes them.

    Raises:
        UserError: several without names, or a name twice.
    """
    if len(given) == 1 and not NAMED.match(given[0]):
        return given[0]
    sets: dict[str, str] = {}
    for one in given:
        name, _, place = one.partition("=")
        if not NAMED.match(one) or name in sets:
            raise UserError(
                f"--reference {one}: several reference sets need a name each: --reference NAME=FILE"
            )
        sets[name] = place
    return sets


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
            f"influence by the estimator '{label(resolved(settings))}' on {references} reference "
            "rows",
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
    if found["pairs"] and found["pairs"]["jaccard"] is not None:
        parts.append(f"pairs {found['pairs']['jaccard']:.2f}")
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
