"""Candidates with scores -> a tuned teacher: the stages of the methods that tune one."""

from collections.abc import Sequence
from dataclasses import dataclass

from montessori_jax.config import TrainingConfig
from montessori_jax.loop import Loop
from montessori_jax.mesh import make_mesh
from montessori_jax.methods.teaching import judge_of, teacher
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model
from montessori_jax.report import lines
from montessori_jax.stages.bootstrap import bootstrap, choose_helpful
from montessori_jax.stages.dpo import dpo
from montessori_jax.stages.judge import judge
from montessori_jax.stages.preferences import preferences
from montessori_jax.stages.respond import respond


@dataclass(frozen=True)
class Candidates:
    """Texts of a teacher that compete.

    ``rows`` have ``id``, ``prompt_id``, ``instruction``, ``response`` and ``raw``, what the teacher
    wrote; ``prompts`` what it was asked. ``suffix`` ends the names of the stages that compare them.
    """

    rows: str
    prompts: str
    suffix: str = ""


@dataclass(frozen=True)
class Scores:
    """A table with ``id`` and a number, and that number's column; the larger is preferred."""

    table: str
    value: str


def compete_in_responses(loop: Loop, instructions: str, suffix: str = "") -> Candidates:
    """Several responses to each of the rows ``instructions``, by the iteration's teacher."""
    config = loop.config
    loop.stage(
        "respond",
        lambda work: respond(
            teacher(loop, loop.teacher),
            instructions,
            config.responses,
            work,
            responses=config.competing_responses,
        ),
        lines.responded,
    )
    return Candidates(loop.folder("respond"), loop.folder("respond/prompts.jsonl"), suffix)


def judge_scores(loop: Loop, candidates: Candidates) -> Scores:
    """A judge's score of each candidate."""
    name = f"judge{candidates.suffix}"
    loop.stage(
        name,
        lambda work: judge(judge_of(loop), candidates.rows, loop.config.judging, work),
        lines.judged,
    )
    return Scores(loop.folder(f"{name}/scores.parquet"), "score")


def prefer(loop: Loop, candidates: Candidates, scores: Scores) -> str:
    """Preference pairs of candidates of one prompt; the folder that `tune` takes."""
    name = f"preferences{candidates.suffix}"
    loop.stage(
        name,
        lambda work: preferences(
            candidates.rows,
            scores.table,
            loop.config.preferences,
            work,
            prompts=candidates.prompts,
            value=scores.value,
        ),
        lines.preferred,
        alone=True,
    )
    return loop.folder(name)


def tune(loop: Loop, pairs: Sequence[str]) -> str:
    """DPO of the iteration's teacher on all pairs; the tuned teacher's folder."""
    config = loop.config
    loop.stage(
        "dpo",
        lambda work: dpo(
            own_teacher(loop, config.dpo), pairs, config.dpo, work, probe=loop.back_end == "vllm"
        ),
        lines.tuned,
        trains=True,
    )
    return loop.folder("dpo/teacher")


def tune_on_helpful(loop: Loop, candidates: Candidates, scores: Scores) -> str:
    """Fine-tuning of the iteration's teacher on its own helpful texts, in place of DPO."""
    config = loop.config
    loop.stage(
        "helpful",
        lambda work: choose_helpful(
            candidates.rows,
            scores.table,
            config.preferences,
            work,
            prompts=candidates.prompts,
            value=scores.value,
        ),
        lines.helpful,
        alone=True,
    )
    loop.stage(
        "bootstrap",
        lambda work: bootstrap(
            own_teacher(loop, config.bootstrap), loop.folder("helpful"), config.bootstrap, work
        ),
        lines.trained,
        trains=True,
    )
    return loop.folder("bootstrap/teacher")


def own_teacher(loop: Loop, settings: TrainingConfig) -> LoadedModel:
    """The iteration's teacher, to be trained by ``settings``."""
    return load_model(loop.teacher, dtype=settings.held_dtype, mesh=make_mesh(loop.config.mesh))
