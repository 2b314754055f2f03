"""Stage: scored candidates -> preference pairs, some held out, with what the teacher was asked.

Writes the data set ``pairs`` and, where pairs are held out, ``heldout``, each with its card.
"""

import json
from pathlib import Path
from typing import Any

from montessori_jax.config import PreferencesConfig
from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import DatasetCard, write_dataset_card
from montessori_jax.errors import UserError
from montessori_jax.preferences import Pair, PairReport, Scored, build_pairs, hold_out
from montessori_jax.runs import remove_tree
from montessori_jax.work import Work

COLUMNS = {
    "prompt_id": "generation prompt",
    "prompt": "what the teacher was asked: JSON chat messages, or plain text",
    "prefill": "how its answer was made to begin",
    "chosen": "the teacher's answer with the larger {value}, word for word after the prefill",
    "rejected": "the one with the smaller {value}",
    "chosen_{value}": "{meaning}",
    "rejected_{value}": "likewise",
}
MEANINGS = {
    "influence": "nats of reference loss; positive helps",
    "score": "a judge's, from 0 to 5",
    "loss": "the warmed-up student's on the sample, in nats a response token",
    "draw": "at random, from 0 to 1",
}
"""What candidates are compared by: a column of the scores, and what it is."""


def join_scores(candidates: str, scores: str, value: str) -> tuple[list[Scored], int]:
    """Candidates with their scores, joined by id, and the number of those without one.

    Raises:
        UserError: a column is missing, or no candidate has a score.
    """
    scored_rows = {str(row["id"]): row for row in read_table(scores, ("id", value))}
    scored = []
    unscored = 0
    for row in read_table(candidates, ("id", "prompt_id", "raw")):
        score = scored_rows.get(str(row["id"]))
        if score is None:
            unscored += 1
            continue
        scored.append(
            Scored(
                id=str(row["id"]),
                prompt_id=str(row["prompt_id"]),
                text=row["raw"],
                influence=score[value],
                offset=score.get("offset"),
            )
        )
    if not scored:
        raise UserError(f"{scores}: none of its ids is in {candidates}: are they of one run?")
    return scored, unscored


def preferences(
    candidates: str,
    scores: str,
    settings: PreferencesConfig,
    work: Work,
    *,
    prompts: str,
    value: str = "influence",
) -> dict[str, Any]:
    """Join candidates with their scores by id and build pairs within each prompt.

    Args:
        candidates: rows with ``id``, ``prompt_id`` and ``raw``.
        scores: rows with ``id`` and ``value``, and ``offset`` for the rule ``relative``.
        settings: the rule, the cap and the held-out fraction.
        work: where to write.
        prompts: rows with ``prompt_id``, ``prompt`` and ``prefill`` (the generate stage's
            ``prompts.jsonl``).
        value: the column of ``scores`` whose larger value is preferred (of `MEANINGS`).

    Raises:
        UserError: no pair could be built; the message counts the causes and names a rule to try.
    """
    scored, unscored = join_scores(candidates, scores, value)
    asked = {row["prompt_id"]: row for row in read_table(prompts, ("prompt_id", "prompt"))}
    pairs, report = build_pairs(scored, settings)
    if not pairs:
        causes = ", ".join(f"{cause}: {n}" for cause, n in report.without.items())
        other = "extremes" if settings.rule != "extremes" else "relative"
        try_rule = f"preferences.rule={other}, or " if value == "influence" else ""
        raise UserError(
            f"rule '{settings.rule}' built no pair from {report.prompts} prompts ({causes}): try "
            f"{try_rule}more candidates a prompt (generation.samples)"
        )
    training, heldout = hold_out(pairs, settings.heldout_fraction, work.seed)
    for name, members in (("pairs", training), ("heldout", heldout)):
        # What an earlier run held out must not be measured on once it is trained on.
        remove_tree(work.folder / name)
        if members:
            card = _card(name, settings, report, work.seed, value)
            rows = [_row(pair, asked, value) for pair in members]
            write_dataset_card(work.folder / name, rows, card)
    return {
        "rule": report.rule,
        "prompts": report.prompts,
        "prompts_without": sum(report.without.values()),
        "without": report.without,
        "pairs": report.pairs,
        "training": len(training),
        "heldout": len(heldout),
        "unscored": unscored,
        "mean_gap": sum(pair.gap for pair in pairs) / len(pairs),
    }


def _card(
    name: str, settings: PreferencesConfig, report: PairReport, seed: int, value: str
) -> DatasetCard:
    use = "to train the teacher on" if name == "pairs" else "held out from training"
    return DatasetCard(
        title=f"Preference pairs, {use}",
        description="Two texts that a teacher wrote for one prompt; the chosen one has the larger "
        f"{value} ({MEANINGS[value]}).",
        columns={
            name.format(value=value): text.format(value=value, meaning=MEANINGS[value])
            for name, text in COLUMNS.items()
        },
        made=(f"candidates of one prompt paired by the rule '{settings.rule}'",),
        counts={"prompts": report.prompts, "pairs of all prompts": report.pairs},
        seed=seed,
    )


def question_of(prompt_id: str, asked: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the teacher was asked, as the first columns of a row for DPO.

    Raises:
        UserError: ``asked`` does not have the prompt.
    """
    question = asked.get(prompt_id)
    if question is None:
        raise UserError(f"prompt {prompt_id} is not in the prompts file")
    prompt = question["prompt"]
    return {
        "prompt_id": prompt_id,
        "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
        "prefill": question.get("prefill", ""),
    }


def _row(pair: Pair, asked: dict[str, dict[str, Any]], value: str) -> dict[str, Any]:
    return {
        **question_of(pair.prompt_id, asked),
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        f"chosen_{value}": pair.chosen.influence,
        f"rejected_{value}": pair.rejected.influence,
    }


def prompts_beside(candidates: str) -> str:
    """The ``prompts.jsonl`` that the generate stage left beside its candidates."""
    path = Path(candidates)
    return str((path if path.is_dir() else path.parent) / "prompts.jsonl")
