"""The loop of Montessori-Instruct (arXiv 2410.14208), readable top to bottom.

`run_iteration` is the paper's figure 2: generate, split, warm up, probe, prefer, DPO, synthesise,
train, evaluate. Each is a stage that writes one folder of the run directory from the folders of
earlier ones, and is passed over when it is done already.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from montessori_jax.config import RunConfig, TrainingConfig
from montessori_jax.costs import Meter, describe_cost
from montessori_jax.data.rows import read_rows
from montessori_jax.data.tables import read_table
from montessori_jax.dtypes import forward_dtype
from montessori_jax.host_memory import return_freed_memory
from montessori_jax.hub import check_hub, push_stage
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model, model_fingerprint
from montessori_jax.report import lines
from montessori_jax.report.summary import summarise
from montessori_jax.report.table import render
from montessori_jax.runs import RunDirectory, value_hash, write_atomic, write_json
from montessori_jax.seeding import derive_seed
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
    """One iteration's surroundings: settings, folders, and how a stage is run."""

    config: RunConfig
    directory: RunDirectory
    iteration: int
    stop: Stop
    say: Say
    quiet: bool

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
    ) -> Result:
        """Run one stage, or give its result if it is done; say in one line what came of it.

        ``draws`` keys the stage's random draws (by default its name): stages that share it draw
        alike.
        """
        full = f"iteration-{self.iteration}/{name}"
        folder = self.directory.stage(full)
        done = folder.result()
        if done is not None:
            self.say(f"{full}: done before: {line(done)}")
            self.push(full, folder.path)
            return done
        self.stop.check()
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


def run_iteration(loop: Loop, teacher: str) -> str:
    """One time round the loop from ``teacher``; returns the tuned teacher's folder."""
    config, data, folder = loop.config, loop.config.data, loop.folder

    def write_data(source: str, prompts: int) -> Callable[[Work], Result]:
        dtype = forward_dtype(config.generation, config.responses)
        return lambda work: generate(
            load_model(source, dtype=dtype),
            data.seeds,
            config.generation,
            config.responses,
            work,
            prompts=prompts,
        )

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
        ),
        lines.tuned,
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
        loop.stage(f"train-{name}", train_on(place), lines.trained, draws="train")

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
        loop.stage(f"evaluate-{name}", evaluate_student(source), lines.evaluated, draws="evaluate")
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
    directory = RunDirectory.create(config, inputs_of(config))
    with directory.locked():
        teacher = config.teacher
        for number in range(1, config.iterations + 1):
            teacher = run_iteration(Loop(config, directory, number, stop, say, quiet), teacher)
        return report(directory, say)


def report(directory: RunDirectory, say: Say) -> dict[str, Any]:
    """Write ``summary.json`` and ``report.md`` and show the latter."""
    summary = summarise(directory)
    write_json(directory.path / "summary.json", summary)
    text = render(summary)
    write_atomic(Path(directory.path / "report.md"), text)
    say("\n" + text)
    return summary
