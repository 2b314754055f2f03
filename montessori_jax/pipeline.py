"""The loop of Montessori-Instruct (arXiv 2410.14208), readable top to bottom.

`run_iteration` is the paper's figure 2: generate, split, warm up, probe, prefer, DPO, synthesise,
train, evaluate. Each is a stage that writes one folder of the run directory from the folders of
earlier ones, and is passed over when it is done already.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from montessori_jax.config import RunConfig, TrainingConfig
from montessori_jax.costs import Meter, describe_cost
from montessori_jax.data.rows import read_rows
from montessori_jax.data.tables import read_table
from montessori_jax.devices import cache_programs, keep_off_accelerator, local_platform
from montessori_jax.dtypes import forward_dtype
from montessori_jax.errors import UserError
from montessori_jax.generation.teacher import Teachers
from montessori_jax.host_memory import return_freed_memory
from montessori_jax.hub import check_hub, push_stage
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model, model_fingerprint
from montessori_jax.report import lines
from montessori_jax.report.summary import summarise
from montessori_jax.report.table import render
from montessori_jax.runs import RunDirectory, value_hash, write_atomic, write_json
from montessori_jax.seeding import derive_seed
from montessori_jax.serving.teachers import (
    BackEnd,
    choose_back_end,
    open_teachers,
    shares_accelerator,
)
from montessori_jax.stage_process import in_own_process
from montessori_jax.stages.dpo import dpo
from montessori_jax.stages.evaluate import evaluate
from montessori_jax.stages.finetune import finetune, warm_up
from montessori_jax.stages.generate import generate
from montessori_jax.stages.influence import influence
from montessori_jax.stages.preferences import preferences
from montessori_jax.stages.similarity import compare_texts
from montessori_jax.stages.split import split_candidates
from montessori_jax.stopping import Stop
from montessori_jax.trackers import Tracking, check_tracker
from montessori_jax.work import Work

Result = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Loop:
    """One iteration's surroundings: settings, folders, and how a stage is run.

    ``teacher`` is the model that the iteration begins with; ``own_processes`` runs each stage that
    trains in a process of its own.
    """

    config: RunConfig
    directory: RunDirectory
    iteration: int
    teacher: str
    stop: Stop
    say: Say
    quiet: bool
    teachers: Teachers | None = None  # None in a stage's own process, which only trains
    back_end: BackEnd = "jax"
    own_processes: bool = False
    only: str | None = None  # in a stage's own process, that stage

    def folder(self, stage: str) -> str:
        """Where a stage of this iteration writes."""
        return str(self.directory.path / f"iteration-{self.iteration}" / stage)

    def stage(
        self,
        name: str,
        body: Callable[[Work], Result],
        line: Callable[[Result], str],
        *,
        draws: str = "",
        trains: bool = False,
    ) -> Result:
        """Run one stage, or give its result if it is done; say in one line what came of it.

        ``draws`` keys the stage's random draws (by default its name): stages that share it draw
        alike. ``trains`` is whether it needs the accelerator for JAX.
        """
        full = f"iteration-{self.iteration}/{name}"
        folder = self.directory.stage(full)
        done = folder.result()
        if self.only is not None and full != self.only:
            assert done is not None, f"{full} comes before {self.only} and is not done"
            return done
        if done is not None:
            self.say(f"{full}: done before: {line(done)}")
            self.push(full, folder.path)
            return done
        self.stop.check()
        if trains and self.teachers is not None:
            self.teachers.release()
        if trains and self.own_processes:
            about = (self.config, self.iteration, self.teacher, self.back_end, full, self.quiet)
            memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(self.config.jax_memory_fraction)}
            in_own_process(run_stage, about, stop=self.stop, environment=memory)
            made = folder.result()
            assert made is not None, f"{full} ended without its marker"
            return made
        meter = Meter(self.directory.path / "costs.jsonl", full)
        seed = derive_seed(self.config.seed, self.iteration, draws or name)
        finished = False
        try:
            tracking = self.tracking(full)
            result = body(Work(folder.path, seed, meter, self.stop, self.say, self.quiet, tracking))
            finished = True
        finally:
            cost = meter.close(finished)
            return_freed_memory()
        folder.finish(result)
        self.say(f"{full}: {line(result)}  ({describe_cost(cost)})")
        self.push(full, folder.path)
        if self.only is not None:
            raise StageEnded
        return result

    def tracking(self, stage: str) -> Tracking:
        """Where the stage's metrics go besides their file."""
        path = self.directory.path
        kinds, project = self.config.tracker, self.config.tracker_project
        return Tracking(kinds, project, path.resolve().name, stage, path / "tracker")

    def push(self, stage: str, folder: Path) -> None:
        """Push what a finished stage made, if that is asked for and not done yet."""
        prefix = self.config.push_to_hub
        if prefix:
            push_stage(folder, stage, prefix, private=self.config.push_private, say=self.say)


class StageEnded(Exception):
    """The one stage that a process is for has ended."""


def run_stage(
    config: RunConfig,
    iteration: int,
    teacher: str,
    back_end: BackEnd,
    only: str,
    quiet: bool,
    stop: Stop,
) -> None:
    """One stage of an iteration whose earlier ones are done: what a stage's own process runs."""
    cache_programs()
    directory = RunDirectory(Path(config.run_dir))
    loop = Loop(
        config, directory, iteration, teacher, stop, say_line, quiet, back_end=back_end, only=only
    )
    with contextlib.suppress(StageEnded):
        run_iteration(loop)


def say_line(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def run_iteration(loop: Loop) -> str:
    """One time round the loop from its teacher; returns the tuned teacher's folder."""
    config, data, folder, teacher = loop.config, loop.config.data, loop.folder, loop.teacher

    def write_data(source: str, prompts: int) -> Callable[[Work], Result]:
        def body(work: Work) -> Result:
            assert loop.teachers is not None
            writer = loop.teachers.teacher(source)
            return generate(
                writer, data.seeds, config.generation, config.responses, work, prompts=prompts
            )

        return body

    def student(settings: TrainingConfig) -> LoadedModel:
        return load_model(config.student, dtype=settings.held_dtype)

    loop.stage("generate", write_data(teacher, config.generation.prompts), lines.generated)
    loop.stage(
        "split",
        lambda work: split_candidates(
            folder("generate"), config.warmup_fraction, config.warmup.rows, work
        ),
        lines.split,
    )
    warmup, probing = folder("split/warmup.parquet"), folder("split/probing.parquet")
    loop.stage(
        "warmup",
        lambda work: warm_up(student(config.warmup), warmup, config.warmup, work),
        lines.trained,
        trains=True,
    )
    loop.stage(
        "influence",
        lambda work: influence(
            folder("warmup"),
            probing,
            data.reference,
            config.influence,
            work,
            num_reference=data.num_reference,
        ),
        lines.scored,
        trains=True,
    )
    scores, asked = folder("influence/scores.parquet"), folder("generate/prompts.jsonl")
    loop.stage(
        "preferences",
        lambda work: preferences(probing, scores, config.preferences, work, prompts=asked),
        lines.preferred,
    )
    loop.stage(
        "dpo",
        lambda work: dpo(
            load_model(teacher, dtype=config.dpo.held_dtype),
            folder("preferences"),
            config.dpo,
            work,
            probe=loop.back_end == "vllm",
        ),
        lines.tuned,
        trains=True,
    )
    tuned = folder("dpo/teacher")

    # From here on two teachers side by side: the tuned one, and the one that the run began with
    # (Self-Instruct): the same prompts, filters, budget and draws.
    teachers = {"tuned": tuned}
    if config.compare_self_instruct:
        teachers = {"untuned": config.teacher, **teachers}
    for name, source in teachers.items():
        writes = write_data(source, config.synthesis_prompts)
        loop.stage(f"synthesise-{name}", writes, lines.generated, draws="synthesise")
    data_of = {name: folder(f"synthesise-{name}") for name in teachers}
    if config.compare_self_instruct:
        loop.stage(
            "similarity",
            lambda work: compare_texts(data_of["untuned"], data_of["tuned"], work),
            lines.compared,
        )
    rows = min(config.sft.rows, *(len(read_table(place)) for place in data_of.values()))
    budget = replace(config.sft, rows=rows)

    def train_on(place: str) -> Callable[[Work], Result]:
        return lambda work: finetune(student(budget), place, budget, work)

    for name, place in data_of.items():
        loop.stage(f"train-{name}", train_on(place), lines.trained, draws="train", trains=True)

    def evaluate_student(source: str) -> Callable[[Work], Result]:
        dtype = forward_dtype(config.evaluation)
        return lambda work: evaluate(
            load_model(source, dtype=dtype),
            data.heldout,
            config.evaluation,
            work,
            num_heldout=data.num_heldout,
        )

    students = {name: folder(f"train-{name}/student") for name in teachers}
    if loop.iteration == 1:  # the student as it is, the same in every iteration
        students = {"untrained": config.student, **students}
    for name, source in students.items():
        loop.stage(
            f"evaluate-{name}",
            evaluate_student(source),
            lines.evaluated,
            draws="evaluate",
            trains=True,
        )
    return tuned


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Content hashes of everything that a run reads, so that changed inputs are noticed."""
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
        "teacher": model_fingerprint(config.teacher),
        "student": model_fingerprint(config.student),
    }


def run(config: RunConfig, *, say: Say, stop: Stop, quiet: bool = False) -> dict[str, Any]:
    """The whole run; resumes where an earlier one in the same directory ended.

    Returns the summary, which is also written to ``summary.json`` and ``report.md``.
    """
    check_tracker(config.tracker)
    check_hub(config.push_to_hub)
    back_end = choose_back_end(config)
    own_processes = stage_processes(config, back_end)
    directory = RunDirectory.create(config, inputs_of(config))
    logs = directory.path / "vllm"
    with (
        directory.locked(),
        contextlib.closing(open_teachers(config, back_end, logs, say=say, stop=stop)) as teachers,
    ):
        teacher = config.teacher
        if not directory.stage("iteration-1/generate").result():
            teachers.check(teacher)
        for number in range(1, config.iterations + 1):
            loop = Loop(
                config, directory, number, teacher, stop, say, quiet, teachers, back_end,
                own_processes,
            )  # fmt: skip
            teacher = run_iteration(loop)
        return report(directory, say)


def stage_processes(config: RunConfig, back_end: BackEnd) -> bool:
    """Whether stages that train run in processes of their own; if so, this one stays off the
    accelerator.

    Raises:
        UserError: the settings cannot work together.
    """
    if back_end == "url":
        raise UserError(
            "generator url: a model behind an address has no weights to tune, which the loop does: "
            "set generator: vllm or jax; montessori generate --generator url only writes data"
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
    """Write ``summary.json`` and ``report.md`` and show the latter."""
    summary = summarise(directory)
    write_json(directory.path / "summary.json", summary)
    text = render(summary)
    write_atomic(Path(directory.path / "report.md"), text)
    say("\n" + text)
    return summary
