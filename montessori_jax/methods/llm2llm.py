"""LLM2LLM (Lee et al. 2024, arXiv 2403.15042): more of what the student finds hard.

A student learns from the seeds; those with its highest losses are expanded by the teacher, from
seeds only; a fresh student learns from the seeds and from all that was written, and is measured on
the seeds next time. The teacher is never tuned.
"""

from montessori_jax.dtypes import forward_dtype
from montessori_jax.loop import Loop, Result
from montessori_jax.mesh import make_mesh
from montessori_jax.methods.teaching import evaluate_students, teacher, train
from montessori_jax.models.sources import load_model
from montessori_jax.report import lines
from montessori_jax.stages.expand import expand
from montessori_jax.stages.losses import losses
from montessori_jax.stages.mix import mix
from montessori_jax.work import Work


def llm2llm(loop: Loop) -> str:
    """One time round; returns the teacher as it was."""
    config, seeds = loop.config, loop.config.data.seeds
    students = {}
    if loop.iteration == 1:
        student = train(loop, "seeds", seeds, config.llm2llm.seed_rows)
        students["seeds"] = student
    else:
        student = loop.folder("train-expanded/student", loop.iteration - 1)

    def measure(work: Work) -> Result:
        dtype = forward_dtype(config.evaluation)
        loaded = load_model(student, dtype=dtype, mesh=make_mesh(config.mesh))
        return losses(
            loaded,
            seeds,
            config.evaluation,
            work,
            fingerprint=loaded.fingerprint,
            limit=config.llm2llm.seed_rows,
        )

    loop.stage("losses", measure, lines.losses_measured, trains=True)
    measured = loop.folder("losses/scores.parquet")
    loop.stage(
        "expand",
        lambda work: expand(
            teacher(loop, loop.teacher),
            seeds,
            measured,
            config.generation,
            config.responses,
            work,
            prompts=config.synthesis_prompts,
            share=config.llm2llm.hard_share,
        ),
        lines.expanded,
        draws="synthesise",
    )
    written = {
        f"iteration-{number}": loop.folder("expand", number)
        for number in range(1, loop.iteration + 1)
    }
    mixed = loop.stage(
        "mix",
        lambda work: mix(seeds, measured, written, work, rows=config.sft.rows),
        lines.mixed,
        alone=True,
    )
    students["expanded"] = train(loop, "expanded", loop.folder("mix"), mixed["rows"])
    evaluate_students(loop, students)
    return loop.teacher
