"""AlpacaEval 2: how often a judge prefers a student's answers to a baseline's, by the library.

Dubois et al. 2024 (arXiv 2404.04475). The prompts and the table that the length-controlled rate
needs are not in the library: they are read from files or from its data set on the hub.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_jax.config import AlpacaEvalConfig
from montessori_jax.data.overlap import prompt_hash
from montessori_jax.data.rows import read_rows
from montessori_jax.dtypes import forward_dtype
from montessori_jax.errors import UserError
from montessori_jax.evaluation.alpaca_library import (
    DEFAULT,
    WITHOUT_LOGPROBS,
    NoLogprobs,
    annotate,
    published_file,
    win_rates,
)
from montessori_jax.evaluation.answers import asked_of, draw_answers, kept_answers, read_answers
from montessori_jax.evaluation.contestants import Contestant, find_contestant
from montessori_jax.evaluation.context import Context, Result
from montessori_jax.evaluation.requirements import check_judged
from montessori_jax.generation.prompts import task_text
from montessori_jax.mesh import mesh_of
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model, model_fingerprint
from montessori_jax.runs import write_json
from montessori_jax.serving.judge import Judge, Judgement, Question
from montessori_jax.work import Work

PUBLISHED = "hf:tatsu-lab/alpaca_eval"
# The 805 prompts' hashes (`prompt_hash`), in the order of every model's file in
# tatsu-lab/alpaca_eval, hashed together: the table of difficulties goes by that order.
ORDER = "a88e7309174d217e"


@dataclass(frozen=True)
class Prompts:
    """The prompts, the answers that their file has, and whether they are the published list."""

    source: str
    instructions: list[str]
    outputs: list[str]
    published: bool


def read_prompts(source: str, count: int) -> Prompts:
    """The first ``count`` prompts of a source (0: all).

    Raises:
        UserError: it cannot be read.
    """
    place: str | Path = source
    if source == PUBLISHED:
        found = published_file("alpaca_eval_gpt4_baseline.json")
        if found is None:
            raise UserError(
                f"{source}: the prompts cannot be had from the Hugging Face hub: set "
                "evaluation.alpaca_eval.prompts to a file of them, such as a model_outputs.json "
                "of tatsu-lab/alpaca_eval"
            )
        place = found
    rows = read_rows(place, need_response=False).require()
    instructions = [task_text(row.instruction, row.input) for row in rows]
    kept = slice(count or None)
    return Prompts(
        source,
        instructions[kept],
        [row.response for row in rows][kept],
        order_hash(instructions) == ORDER,
    )


def order_hash(instructions: Sequence[str]) -> str:
    """8 bytes of BLAKE2b, in hex, of the hashes of prompts in their order."""
    hashes = " ".join(str(prompt_hash(one)) for one in instructions)
    return hashlib.blake2b(hashes.encode(), digest_size=8).hexdigest()


def alpaca_eval(context: Context) -> Result:
    """The evaluation ``alpaca_eval``.

    Returns:
        ``win_rate``, ``length_controlled_win_rate`` and their standard errors in percent, ``wins``,
        ``losses``, ``draws``, ``judged``, ``unparseable``, mean lengths in characters, the same
        without the prompts of the reference set, and what the judge cost. Where the
        length-controlled rate is None, ``length_control`` says why.

    Raises:
        UserError: there is no judge, prompts or baseline, or the judge does not answer.
    """
    settings, work = context.settings.alpaca_eval, context.work
    check_judged(context.settings, context.judge, self_instruct=bool(context.self_instruct))
    judge = Judge.of(context.judge)
    prompts = read_prompts(settings.prompts, settings.num_prompts)
    baseline, name = baseline_answers(context, prompts)
    answers = answers_by(
        context, prompts, "alpaca_eval_answers.jsonl", context.student.fingerprint,
        lambda: context.student,
    )  # fmt: skip
    judged: dict[str, Judgement] = {}

    def ask(questions: Sequence[Question]) -> dict[str, Judgement]:
        path = work.file("alpaca_eval_judgements.jsonl")
        found = judge.ask(questions, path, work, label="alpaca_eval judge")
        judged.update(found)
        return found

    annotator, preferences = judge_all(settings, prompts, baseline, answers, ask, work)
    table, reason = length_table(settings, prompts)
    everything = list(range(len(answers)))
    chosen = (preferences, baseline, answers)
    seen = prompts_of_reference(context, prompts.instructions)
    apart = [place for place in everything if place not in seen]
    write_json(
        work.file("alpaca_eval_annotations.json"),
        [
            {"instruction": asked, "output_1": theirs, "output_2": ours, "preference": preference}
            for asked, theirs, ours, preference in zip(
                prompts.instructions, baseline, answers, preferences, strict=True
            )
        ],
    )
    found = rates(*chosen, everything, table)
    if table is not None and found["length_controlled_win_rate"] is None:
        reason = "not computed: nothing was judged, or all answers differ by one length"
    result = {
        **found,
        "length_control": reason,
        "baseline": name,
        "annotator": annotator,
        "prompts": len(answers),
        "mean_length": _mean_length(answers),
        "baseline_mean_length": _mean_length(baseline),
        "cost": judge.cost(list(judged.values())),
    }
    if context.reference:
        own = rates(*chosen, apart, table) if seen else None
        result["without_reference_prompts"] = {"left_out": len(seen), **(own or {})}
    return result


def judge_all(
    settings: AlpacaEvalConfig,
    prompts: Prompts,
    baseline: list[str],
    answers: list[str],
    ask: Any,
    work: Work,
) -> tuple[str, list[float | None]]:
    """The annotator that the judge could serve, and its preferences."""
    sides = prompts.instructions, baseline, answers
    name = DEFAULT if settings.annotator == "auto" else settings.annotator
    try:
        return name, annotate(name, *sides, ask)
    except NoLogprobs as missing:
        if settings.annotator != "auto":
            why = f" ({missing})" if str(missing) else ""
            raise UserError(
                f"the judge gives no log-probs, which {name} reads: set "
                f"evaluation.alpaca_eval.annotator: {WITHOUT_LOGPROBS}{why}"
            ) from None
    work.say(f"the judge gives no log-probs: it is asked by {WITHOUT_LOGPROBS} instead of {name}")
    return WITHOUT_LOGPROBS, annotate(WITHOUT_LOGPROBS, *sides, ask)


def rates(
    preferences: Sequence[float | None],
    baseline: Sequence[str],
    answers: Sequence[str],
    places: Sequence[int],
    table: Path | None,
) -> Result:
    """Win rates over the prompts at ``places``; None for what no judgement was left for."""
    kept = [preferences[place] for place in places]
    theirs, ours = [baseline[i] for i in places], [answers[i] for i in places]
    judged = len(kept) - kept.count(None)
    found: dict[str, Any] = {}
    if judged:
        lengths = {len(one) - len(other) for one, other in zip(theirs, ours, strict=True)}
        fits = table if len(lengths) > 1 or theirs == ours else None
        found = win_rates(kept, theirs, ours, places, table=fits)
    return {
        "win_rate": found.get("win_rate"),
        "standard_error": _number(found.get("standard_error")),
        "length_controlled_win_rate": found.get("length_controlled_winrate"),
        "length_controlled_standard_error": _number(found.get("lc_standard_error")),
        "wins": found.get("n_wins", 0),
        "losses": found.get("n_wins_base", 0),
        "draws": found.get("n_draws", 0),
        "judged": judged,
        "unparseable": kept.count(None),
    }


def length_table(settings: AlpacaEvalConfig, prompts: Prompts) -> tuple[Path | None, str]:
    """The table for the length-controlled rate, or None and why there is no such rate."""
    if not prompts.published:
        return None, (
            f"not computed: {prompts.source} is not AlpacaEval's list of 805 prompts in its order"
        )
    if settings.length_table:
        return Path(settings.length_table), "computed"
    table = published_file("df_gamed.csv")
    if table is None:
        return None, (
            "not computed: the library's df_gamed.csv cannot be had from the Hugging Face hub: set "
            "evaluation.alpaca_eval.length_table to a copy"
        )
    return table, "computed"


def baseline_answers(context: Context, prompts: Prompts) -> tuple[list[str], str]:
    """The answers to beat, and whose they are."""
    settings = context.settings.alpaca_eval
    if settings.baseline == "outputs":
        if not all(prompts.outputs):
            raise UserError(f"{prompts.source} has prompts without output: set another baseline")
        return prompts.outputs, f"outputs of {prompts.source}"
    if settings.baseline == "self_instruct":
        other = Contestant(settings.baseline, model=context.self_instruct)
    else:
        other = find_contestant(settings.baseline)
    if other.answers:
        return read_answers(other.answers, prompts.instructions), other.name

    def load() -> LoadedModel:
        dtype = forward_dtype(settings.answers)
        return load_model(other.model, dtype=dtype, mesh=mesh_of(context.student.params))

    name = "alpaca_eval_baseline_answers.jsonl"
    fingerprint = model_fingerprint(other.model)
    return answers_by(context, prompts, name, fingerprint, load), settings.baseline


def answers_by(
    context: Context,
    prompts: Prompts,
    name: str,
    fingerprint: str,
    load: Callable[[], LoadedModel],
) -> list[str]:
    """A model's answers, journalled as ``name``; it is loaded only if it has to answer.

    What another evaluation of the same iteration has drawn from it is copied.
    """
    work, settings = context.work, context.settings.alpaca_eval.answers
    asked, path = asked_of(prompts.instructions), work.file(name)
    earlier = sorted(work.folder.parent.glob("evaluate-*/alpaca_eval*answers.jsonl"))
    kept = kept_answers(fingerprint, asked, settings, path, work, elsewhere=earlier)
    if kept is not None:
        return kept
    return draw_answers(load(), asked, settings, path, work, label=name.removesuffix(".jsonl"))


def prompts_of_reference(context: Context, instructions: Sequence[str]) -> set[int]:
    """Places of prompts that are also in the reference set, found as `data.overlap` finds them."""
    if not context.reference:
        return set()
    rows = read_rows(context.reference, need_response=False, limit=context.num_reference).rows
    known = {prompt_hash(row.instruction) for row in rows}
    known |= {prompt_hash(task_text(row.instruction, row.input)) for row in rows}
    return {place for place, one in enumerate(instructions) if prompt_hash(one) in known - {None}}


def _mean_length(texts: Sequence[str]) -> float:
    return sum(map(len, texts)) / len(texts)


def _number(value: float | None) -> float | None:
    """None for a standard error of one value, which pandas calls NaN."""
    return None if value is None or value != value else value
