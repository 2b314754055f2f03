"""The loop of Montessori-Instruct (arXiv 2410.14208), readable top to bottom.

`run_iteration` is the paper's figure 2: generate, split, warm up, probe, prefer, DPO, synthesise,
train, evaluate. Each line is a stage that writes one folder of the run directory and is passed
over when it is done already.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from montessori_jax.config import RunConfig
from montessori_jax.costs import Meter, describe_cost
from montessori_jax.data.overlap import warn_about_overlaps
from montessori_jax.data.rows import read_rows
from montessori_jax.data.tables import read_table
from montessori_jax.models.sources import load_model, model_fingerprint
from montessori_jax.report.summary import summarise
from montessori_jax.report.table import render
from montessori_jax.runs import RunDirectory, value_hash, write_atomic, write_json
from montessori_jax.seeding import derive_seed
from montessori_jax.stages.dpo import dpo
from montessori_jax.stages.evaluate import evaluate
from montessori_jax.stages.finetune import finetune, warm_up
from montessori_jax.stages.generate import generate
from montessori_jax.stages.influence import audit_line, influence
from montessori_jax.stages.preferences import preferences
from montessori_jax.stages.similarity import compare_texts
from montessori_jax.stages.split import split_candidates
from montessori_jax.stopping import Stop
from montessori_jax.work import Work

Result = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Loop:
    """One run's surroundings: its directory, its settings, and how a stage is run in it."""

    config: RunConfig
    directory: RunDirectory
    stop: Stop
    say: Say
    quiet: bool

    def stage(
        self, name: str, seeded: str, body: Callable[[Work], Result], line: Callable[[Result], str]
    ) -> Result:
        """Run one stage, or give its result if it is done; one line of what came of it.

        ``seeded`` says what the stage's random draws are for: stages that share it draw alike.
        """
        folder = self.directory.stage(name)
        done = folder.result()
        if done is not None:
            self.say(f"{name}: done before: {line(done)}")
            return done
        self.stop.check()
        meter = Meter(self.directory.path / "costs.jsonl", name)
        finished = False
        try:
            result = body(
                Work(
                    folder=folder.path,
                    seed=derive_seed(self.config.seed, seeded),
                    meter=meter,
                    stop=self.stop,
                    say=self.say,
                    quiet=self.quiet,
                )
            )
            finished = True
        finally:
            cost = meter.close(finished)
        folder.finish(result)
        self.say(f"{name}: {line(result)}  ({describe_cost(cost)})")
        return result

    def path(self, name: str) -> str:
        return str(self.directory.path / name)


def run_iteration(loop: Loop, number: int, teacher: str) -> str:
    """One time round the loop; returns the folder of the tuned teacher."""
    config, data = loop.config, loop.config.data
    here = f"iteration-{number}"
    seeded = f"iteration {number}"

    loop.stage(
        f"{here}/generate",
        f"{seeded}: probe",
        lambda work: generate(
            load_model(teacher),
            data.seeds,
            config.generation,
            config.responses,
            work,
            prompts=config.generation.prompts,
        ),
        lambda r: f"{r['kept']} of {r['candidates']} candidates kept, {r['rows']} with a response",
    )
    loop.stage(
        f"{here}/split",
        f"{seeded}: split",
        lambda work: split_candidates(
            loop.path(f"{here}/generate"), config.warmup_fraction, config.warmup.rows, work
        ),
        lambda r: f"{r['warmup']} rows to warm up, {r['probing']} to probe",
    )
    loop.stage(
        f"{here}/warmup",
        f"{seeded}: warm-up",
        lambda work: warm_up(
            load_model(config.student),
            loop.path(f"{here}/split/warmup.parquet"),
            config.warmup,
            work,
        ),
        lambda r: f"loss {r['first_loss']:.3f} -> {r['last_loss']:.3f} in {r['steps']} steps",
    )
    loop.stage(
        f"{here}/influence",
        f"{seeded}: influence",
        lambda work: influence(
            loop.path(f"{here}/warmup"),
            loop.path(f"{here}/split/probing.parquet"),
            data.reference,
            config.influence,
            work,
            num_reference=data.num_reference,
        ),
        lambda r: (
            f"{r['scored']} scored, {r['null']} not, {r['positive_share']:.0%} positive"
            f"{audit_line(r['audit'])}"
        ),
    )
    loop.stage(
        f"{here}/preferences",
        f"{seeded}: preferences",
        lambda work: preferences(
            loop.path(f"{here}/split/probing.parquet"),
            loop.path(f"{here}/influence/scores.parquet"),
            config.preferences,
            work,
            prompts=loop.path(f"{here}/generate/prompts.jsonl"),
        ),
        lambda r: (
            f"{r['pairs']} pairs ({r['heldout']} held out) by rule '{r['rule']}', "
            f"{r['prompts_without']} of {r['prompts']} prompts gave none"
        ),
    )
    loop.stage(
        f"{here}/dpo",
        f"{seeded}: dpo",
        lambda work: dpo(load_model(teacher), loop.path(f"{here}/preferences"), config.dpo, work),
        dpo_line,
    )
    tuned = loop.path(f"{here}/dpo/teacher")
    teachers = {"tuned": tuned}
    if config.compare_self_instruct:
        # Self-Instruct: the teacher as it came, the same prompts and filters, equal seeds.
        teachers["untuned"] = config.teacher
    train_students(loop, here, seeded, teachers)
    return tuned


def train_students(loop: Loop, here: str, seeded: str, teachers: dict[str, str]) -> None:
    """Each teacher writes training data; a fresh student learns from it; all are compared."""
    config, data = loop.config, loop.config.data
    for name, source in teachers.items():
        loop.stage(
            f"{here}/synthesise-{name}",
            f"{seeded}: synthesise",
            lambda work, source=source: generate(
                load_model(source),
                data.seeds,
                config.generation,
                config.responses,
                work,
                prompts=config.synthesis_prompts,
            ),
            lambda r: f"{r['kept']} of {r['candidates']} candidates kept, {r['rows']} rows",
        )
    folders = {name: loop.path(f"{here}/synthesise-{name}") for name in teachers}
    if "untuned" in folders:
        loop.stage(
            f"{here}/similarity",
            f"{seeded}: similarity",
            lambda work: compare_texts(folders["untuned"], folders["tuned"], work),
            lambda r: f"{r['changed_share']:.0%} of the tuned teacher's texts differ",
        )
    budget = min(config.sft.rows, *(len(read_table(folder)) for folder in folders.values()))
    for name, folder in folders.items():
        loop.stage(
            f"{here}/train-{name}",
            f"{seeded}: train",
            lambda work, folder=folder: finetune(
                load_model(config.student), folder, replace(config.sft, rows=budget), work
            ),
            lambda r: (
                f"{r['rows']} rows, loss {r['first_loss']:.3f} -> {r['last_loss']:.3f} "
                f"in {r['steps']} steps"
            ),
        )
    students = {"untrained": config.student}
    students |= {
        name: loop.path(f"{here}/train-{name}/student") for name in sorted(teachers, reverse=True)
    }
    for name, source in students.items():
        loop.stage(
            f"{here}/evaluate-{name}",
            f"{seeded}: evaluate",
            lambda work, source=source: evaluate(
                load_model(source),
                data.heldout,
                config.evaluation,
                work,
                num_heldout=data.num_heldout,
            ),
            lambda r: (
                f"held-out reference loss {r['reference_loss']['loss']:.4f} "
                f"± {r['reference_loss']['standard_error']:.4f}"
            ),
        )


def dpo_line(result: Result) -> str:
    """What came of DPO, in a line."""
    line = f"loss {result['first_loss']:.3f} -> {result['last_loss']:.3f}"
    held = result.get("heldout_after")
    if held is None:
        return line
    margin, accuracy = held["reward_margin"], held["reward_accuracy"]
    return f"{line}; held out: margin {margin:+.3f}, accuracy {accuracy:.0%}"


def inputs_of(config: RunConfig) -> dict[str, str]:
    """Content hashes of everything that a run reads, so that changed inputs are noticed."""
    return {
        name: value_hash([asdict(row) for row in read_rows(source, need_response=False).rows])
        for name, source in (
            ("seeds", config.data.seeds),
            ("reference", config.data.reference),
            ("heldout", config.data.heldout),
        )
    } | {
        "teacher": model_fingerprint(config.teacher),
        "student": model_fingerprint(config.student),
    }


def run(config: RunConfig, *, say: Say, stop: Stop, quiet: bool = False) -> dict[str, Any]:
    """The whole run; resumes where an earlier one in the same directory ended.

    Returns the summary, which is also written to ``summary.json`` and ``report.md``.
    """
    reference = read_rows(config.data.reference)
    for warning in warn_about_overlaps(reference.require()[: config.data.num_reference]):
        say(f"warning: {warning}")
    directory = RunDirectory.create(config, inputs_of(config))
    with directory.locked():
        loop = Loop(config, directory, stop, say, quiet)
        teacher = config.teacher
        for number in range(1, config.iterations + 1):
            teacher = run_iteration(loop, number, teacher)
        summary = summarise(directory)
        write_json(directory.path / "summary.json", summary)
        text = render(summary)
        write_atomic(directory.path / "report.md", text)
        say(text)
    return summary
