"""A run: its directory, its back-end, and the loop over iterations of its method.

What an iteration does is the method's: `montessori_jax.methods.montessori` is the paper's.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from montessori_jax import cluster
from montessori_jax.config import RunConfig, as_dict
from montessori_jax.data.overlap import warn_about_overlaps
from montessori_jax.data.rows import read_rows
from montessori_jax.devices import cache_programs, keep_off_accelerator, local_platform
from montessori_jax.errors import UserError
from montessori_jax.evaluation.requirements import check_evaluations
from montessori_jax.hub import check_hub
from montessori_jax.loop import Loop, Say, StageEnded
from montessori_jax.methods import METHODS
from montessori_jax.models.sources import model_fingerprint
from montessori_jax.report import page
from montessori_jax.report.summary import summarise
from montessori_jax.report.table import render
from montessori_jax.runs import MARKER, RunDirectory, flatten, value_hash, write_atomic, write_json
from montessori_jax.serving.teachers import (
    BackEnd,
    UrlTeachers,
    choose_back_end,
    open_teachers,
    shares_accelerator,
)
from montessori_jax.stopping import Stop
from montessori_jax.storage import local_folder, mirrored
from montessori_jax.trackers import check_tracker


def run_stage(
    config: RunConfig,
    folder: Path,
    iteration: int,
    teacher: str,
    back_end: BackEnd,
    only: str,
    quiet: bool,
    profile: Path | None,
    stop: Stop,
) -> None:
    """One stage of an iteration whose earlier ones are done: what a stage's own process runs."""
    cache_programs()
    directory = RunDirectory(folder)
    loop = Loop(
        config, directory, iteration, teacher, stop, say_line, quiet, back_end=back_end, only=only,
        profile=profile,
    )  # fmt: skip
    with contextlib.suppress(StageEnded):
        METHODS[config.method].iterate(loop)


def nothing(text: str) -> None:
    """What a process says that is not the leader."""


def say_line(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Content hashes of everything that a run reads, so that changed inputs are noticed."""
    local_teacher = METHODS[config.method].writes_first and config.generator != "url"
    sources = {
        "seeds": config.data.seeds,
        "reference": config.data.reference,
        "heldout": config.data.heldout,
    }
    rows = {
        name: [asdict(row) for row in read_rows(source, need_response=name != "seeds").require()]
        for name, source in sources.items()
    }
    return {
        **{name: value_hash(content) for name, content in rows.items()},
        **({"teacher": model_fingerprint(config.teacher)} if local_teacher else {}),
        "student": model_fingerprint(config.student),
    }


@contextlib.contextmanager
def opened(config: RunConfig, say: Say) -> Iterator[RunDirectory]:
    """The run's directory, ours alone within the block; where it is a URL, kept like that.

    Of several processes the leader holds it; the others see what it has written, or fetch it into
    a folder of their own.
    """
    folder = local_folder(config.run_dir, config.local_dir)
    with contextlib.ExitStack() as stack:
        inputs = inputs_of(config)
        settings = {k: v for k, v in flatten(as_dict(config)).items() if k != "local_dir"}
        cluster.same_everywhere({**settings, **{f"content of {k}": v for k, v in inputs.items()}})
        if cluster.is_leader():
            stack.enter_context(RunDirectory(folder).locked())
        kept = stack.enter_context(mirrored(config.run_dir, folder, say))
        if cluster.is_leader():
            RunDirectory.create(config, inputs, folder)
        cluster.barrier("the run directory")
        kept.share()
        yield kept.open(folder)


def run(
    config: RunConfig, *, say: Say, stop: Stop, quiet: bool = False, profile: Path | None = None
) -> dict[str, Any]:
    """The whole run; resumes where an earlier one in the same directory ended.

    ``profile`` is a folder for traces of the stages that train, measure or evaluate.

    Returns the summary, which is also written to ``summary.json``, ``report.md`` and, with the
    extra ``report``, ``report.html``.
    """
    check_tracker(config.tracker)
    check_hub(config.push_to_hub)
    compares = METHODS[config.method].tunes and config.compare_self_instruct
    check_evaluations(
        config.evaluation,
        config.judge,
        self_instruct=compares or config.method == "self_instruct",
    )
    back_end = choose_back_end(config)
    own_processes = stage_processes(config, back_end)
    if cluster.count() > 1 and (back_end != "jax" or own_processes):
        raise UserError(
            "several processes: only the built-in sampler writes in all of them: set generator: "
            "jax and stage_processes: never"
        )
    if not cluster.is_leader():
        say, quiet = nothing, True
    with (
        opened(config, say) as directory,
        contextlib.closing(
            open_teachers(config, back_end, directory.path / "vllm", say=say, stop=stop)
        ) as teachers,
    ):
        if cluster.is_leader():
            seeds = read_rows(config.data.seeds, need_response=False).rows
            for warning in warn_about_overlaps(seeds, name=f"the seeds {config.data.seeds}"):
                say(f"warning: {warning}")
        method, teacher = METHODS[config.method], config.teacher
        rounds = config.iterations if method.goes_round else 1
        if rounds < config.iterations:
            say(f"{config.method} does not go round: one iteration instead of {config.iterations}")
        first = directory.path / "iteration-1" / method.writes_first / MARKER
        if method.writes_first and not first.exists():
            teachers.check(teacher)
            if config.judged and config.judge.base_url:
                UrlTeachers(config.judge).check("")
        for number in range(1, rounds + 1):
            loop = Loop(
                config, directory, number, teacher, stop, say, quiet, teachers, back_end,
                run_stage if own_processes else None, profile=profile,
            )  # fmt: skip
            teacher = method.iterate(loop)
        return report(directory, say) if cluster.is_leader() else {}


def stage_processes(config: RunConfig, back_end: BackEnd) -> bool:
    """Whether stages that train run in processes of their own; if so, this one stays off the
    accelerator.

    Raises:
        UserError: the settings cannot work together.
    """
    if back_end == "url" and METHODS[config.method].tunes:
        raise UserError(
            f"generator url: a model behind an address has no weights to tune, which the method "
            f"{config.method} does: set generator: vllm or jax, or method: self_instruct or llm2llm"
        )
    shared = shares_accelerator(config, back_end)
    if shared and config.stage_processes == "never":
        raise UserError(
            "vLLM shares the accelerator with training, whose memory only comes back when its "
            "process ends: set stage_processes: auto, or give vLLM GPUs of its own (vllm.devices)"
        )
    if config.stage_processes == "always" and back_end == "jax" and local_platform() != "cpu":
        raise UserError(
            "stage_processes always: the built-in sampler would hold the accelerator that the "
            "stages' own processes need: set stage_processes: auto, or generator: vllm"
        )
    own = config.stage_processes == "always" or (config.stage_processes == "auto" and shared)
    if own:
        keep_off_accelerator()
    return own


def report(directory: RunDirectory, say: Say) -> dict[str, Any]:
    """Write ``summary.json``, ``report.md`` and ``report.html``; show the second."""
    summary = summarise(directory)
    write_json(directory.path / "summary.json", summary)
    text = render(summary)
    write_atomic(Path(directory.path / "report.md"), text)
    say("\n" + text)
    if page.available():
        written = page.write_page([directory.path], directory.path, parse=False)
        say(f"The page of figures and samples: {written}")
    return summary
