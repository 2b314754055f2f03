"""Stages: the teacher's helpful texts, and its fine-tuning on them: what DPO is compared with.

``choose_helpful`` writes a data set, ``bootstrap`` writes ``teacher/`` and ``metrics.jsonl``.
"""

from functools import partial
from typing import Any

from montessori_jax import cluster
from montessori_jax.config import BootstrapConfig, PreferencesConfig
from montessori_jax.data.chat import ChatError, ChatFormat, EncodedChat, fit
from montessori_jax.data.encode import EncodedRows
from montessori_jax.data.own_parts import read_table_together
from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import DatasetCard, write_dataset_card
from montessori_jax.errors import UserError
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.preferences import helpful
from montessori_jax.stages.dpo import prompt_of
from montessori_jax.stages.finetune import train
from montessori_jax.stages.preferences import join_scores, question_of
from montessori_jax.stages.trained import export
from montessori_jax.work import Work

COLUMNS = {
    "prompt_id": "generation prompt",
    "prompt": "what the teacher was asked: JSON chat messages, or plain text",
    "prefill": "how its answer was made to begin",
    "answer": "what it wrote, word for word after the prefill",
}


def choose_helpful(
    candidates: str,
    scores: str,
    settings: PreferencesConfig,
    work: Work,
    *,
    prompts: str,
    value: str,
) -> dict[str, Any]:
    """Write the texts of the helpful candidates (`montessori_jax.preferences.helpful`).

    Arguments are as of `montessori_jax.stages.preferences.preferences`.

    Raises:
        UserError: no candidate is helpful by the rule.
    """
    scored, unscored = join_scores(candidates, scores, value)
    found = helpful(scored, settings)
    if not found:
        advice = (
            "raise generation.samples (or judging.samples), so that the scores of a prompt differ"
            if settings.rule == "extremes"
            else "try preferences.rule=extremes"
        )
        raise UserError(
            f"none of {len(scored)} candidates is helpful by the rule '{settings.rule}': {advice}"
        )
    asked = {row["prompt_id"]: row for row in read_table(prompts, ("prompt_id", "prompt"))}
    rows = [{**question_of(one.prompt_id, asked), "answer": one.text} for one in found]
    card = DatasetCard(
        title="A teacher's helpful texts",
        description="What a teacher wrote that is worth learning from by the rule "
        f"'{settings.rule}', with what it was asked.",
        columns=COLUMNS,
        made=(f"took the candidates whose {value} makes them helpful",),
        counts={"candidates": len(scored)},
        seed=work.seed,
    )
    write_dataset_card(work.folder, rows, card)
    return {"candidates": len(scored), "helpful": len(rows), "unscored": unscored}


def bootstrap(
    teacher: LoadedModel, texts: str, settings: BootstrapConfig, work: Work
) -> dict[str, Any]:
    """Fine-tune ``teacher`` on its own texts, as the answers to what it was asked.

    Args:
        teacher: the model; its parameters are used up.
        texts: rows with ``prompt``, ``prefill`` and ``answer``.
        settings: optimizer, numerics and the most rows.
        work: where to write.

    Raises:
        UserError: no row can be trained on.
    """
    chat = ChatFormat.of(teacher)
    chats, skipped = [], {}
    cut = 0
    rows = read_table_together(texts, tuple(COLUMNS))[: settings.rows]
    made = cluster.shared_out(rows, partial(_encoded, chat=chat))
    for number, whole in enumerate(made):
        if isinstance(whole, str):
            skipped[number] = whole
            continue
        fitted = fit(whole, settings.max_length)
        if fitted is None:
            skipped[number] = f"prompt longer than {settings.max_length} tokens"
            continue
        cut += len(fitted.tokens) < len(whole.tokens)
        chats.append(fitted)
    encoded = EncodedRows([], chats, skipped, cut)
    if not chats:
        raise UserError(f"{texts}: no text to learn from: {encoded.causes()}")
    model, state, result = train(teacher, encoded, settings, work)
    card = (
        "# Teacher fine-tuned on its own helpful texts\n\n"
        f"From `{teacher.name}` by supervised fine-tuning on {result['rows']} texts of its own, "
        f"in {result['steps']} optimizer steps, with montessori_jax.\n"
    )
    export(work.folder, "teacher", model, state.params, teacher, card)
    work.remove_checkpoints()
    return result


def _encoded(row: dict[str, Any], chat: ChatFormat) -> EncodedChat | str:
    try:
        return chat.encode_answer(prompt_of(row["prompt"]), row["answer"], prefill=row["prefill"])
    except ChatError as error:
        return str(error)
