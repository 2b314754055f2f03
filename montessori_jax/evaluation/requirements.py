"""What evaluations need besides a student, asked for before hours of other work."""

from pathlib import Path

from montessori_jax import cluster
from montessori_jax.config import EvaluationConfig, JudgeConfig
from montessori_jax.errors import UserError
from montessori_jax.evaluation.alpaca_library import annotator_config, library
from montessori_jax.evaluation.contestants import EXPECTED, find_contestant
from montessori_jax.evaluation.lm_harness import check_tasks
from montessori_jax.serving.judge import Judge

ANSWERED = ("alpaca_eval", "mt_bench")
"""Evaluations in which the student answers and a judge reads."""


def check_evaluations(
    settings: EvaluationConfig, judging: JudgeConfig, *, self_instruct: bool
) -> None:
    """Refuse now what an evaluation would refuse after training: see `check_judged`.

    Raises:
        UserError: also of lm-evaluation-harness, that it or a task is missing, or several
            processes are to write text.
    """
    check_judged(settings, judging, self_instruct=self_instruct)
    if "lm_harness" in settings.evaluations:
        check_tasks(settings.harness)


def check_judged(settings: EvaluationConfig, judging: JudgeConfig, *, self_instruct: bool) -> None:
    """Refuse what evaluations with a judge would refuse once the student has answered.

    Args:
        settings: of all evaluations.
        judging: the judge.
        self_instruct: whether there is a student of the untuned teacher to compare with.

    Raises:
        UserError: there is no judge, a package, an annotator, a baseline or a file is missing, or
            several processes are to do what one does.
    """
    named = [name for name in ANSWERED if name in settings.evaluations]
    if not named:
        return
    Judge.of(judging)
    if cluster.count() > 1:
        raise UserError(
            f"{' and '.join(named)}: students answer in one process: leave them out of "
            "evaluation.evaluations here, and run montessori evaluate on the trained students"
        )
    if "alpaca_eval" in named:
        library()
        annotator, baseline = settings.alpaca_eval.annotator, settings.alpaca_eval.baseline
        if annotator != "auto":
            annotator_config(annotator)
        if baseline not in ("self_instruct", "outputs"):
            _check_baseline("alpaca_eval", baseline)
        if baseline == "self_instruct" and not self_instruct:
            raise UserError(
                "evaluation.alpaca_eval.baseline self_instruct: there is no such student here; set "
                "outputs (those in the prompts' file), a file of answers, a model, or "
                "RUN[:iteration[:student]]"
            )
    if "mt_bench" in named and settings.mt_bench.baseline:
        _check_baseline("mt_bench", settings.mt_bench.baseline)
    files = {
        "alpaca_eval.prompts": settings.alpaca_eval.prompts,
        "alpaca_eval.length_table": settings.alpaca_eval.length_table,
        "mt_bench.questions": settings.mt_bench.questions,
        "mt_bench.judge_prompts": settings.mt_bench.judge_prompts,
        "mt_bench.references": settings.mt_bench.references,
    }
    for key, value in files.items():
        name = key.partition(".")[0]
        if name not in named:
            continue
        if name == "mt_bench" and not value and key != "mt_bench.references":
            raise UserError(
                "mt_bench needs FastChat's question.jsonl and judge_prompts.jsonl: set "
                "evaluation.mt_bench.questions and evaluation.mt_bench.judge_prompts"
            )
        if value and not value.startswith(("hf:", "package:")) and not Path(value).is_file():
            raise UserError(f"evaluation.{key}: {value} does not exist")


def _check_baseline(name: str, baseline: str) -> None:
    """Whether its file, run or folder is there; what is to be downloaded is not looked for."""
    model = find_contestant(baseline).model
    if model and not model.startswith(("hf:", "wheel:")) and not Path(model).expanduser().exists():
        raise UserError(
            f"evaluation.{name}.baseline {baseline}: there is no {model}: give {EXPECTED}"
        )
