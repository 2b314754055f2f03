"""Montessori-Instruct (Li, Yu, Xiong 2025, arXiv 2410.14208), readable top to bottom, and its
ablations: other signals than influence, other texts than instructions, fine-tuning for DPO.

`montessori` is the paper's figure 2: generate, split, warm up, probe, prefer, DPO, synthesise,
train, evaluate. Each is a stage that writes one folder of the run directory from the folders of
earlier ones, and is passed over when it is done already.
"""

from montessori_jax.loop import Loop, Result
from montessori_jax.mesh import make_mesh
from montessori_jax.methods.curve import curves
from montessori_jax.methods.preferring import (
    Candidates,
    Scores,
    compete_in_responses,
    judge_scores,
    prefer,
    tune,
    tune_on_helpful,
)
from montessori_jax.methods.teaching import (
    fresh_student,
    synthesise_with_tuned,
    train_and_evaluate,
    write_data,
)
from montessori_jax.report import lines
from montessori_jax.stages.draws import draws
from montessori_jax.stages.finetune import warm_up
from montessori_jax.stages.influence import influence
from montessori_jax.stages.losses import losses
from montessori_jax.stages.split import split_candidates
from montessori_jax.stages.student import open_student
from montessori_jax.work import Work


def montessori(loop: Loop) -> str:
    """One time round the loop from its teacher; returns the tuned teacher's folder."""
    config, folder = loop.config, loop.folder
    loop.stage(
        "generate", write_data(loop, loop.teacher, config.generation.prompts), lines.generated
    )
    loop.stage(
        "split",
        lambda work: split_candidates(
            folder("generate"), config.warmup_fraction, config.warmup.rows, work
        ),
        lines.split,
        alone=True,
    )
    warmup, probing = folder("split/warmup.parquet"), folder("split/probing.parquet")
    if config.signal in ("influence", "training_loss"):
        loop.stage(
            "warmup",
            lambda work: warm_up(fresh_student(loop, config.warmup), warmup, config.warmup, work),
            lines.trained,
            trains=True,
        )
    compared = []
    if config.optimise != "response":
        compared.append(Candidates(probing, folder("generate/prompts.jsonl")))
    if config.optimise in ("response", "both"):
        compared.append(compete_in_responses(loop, probing, suffix="-responses"))
    scores = [SIGNALS[config.signal](loop, candidates) for candidates in compared]
    if config.optimise == "bootstrap":
        tuned = tune_on_helpful(loop, compared[0], scores[0])
    else:
        pairs = [
            prefer(loop, candidates, found)
            for candidates, found in zip(compared, scores, strict=True)
        ]
        tuned = tune(loop, pairs)
    data_of = synthesise_with_tuned(loop, tuned)
    train_and_evaluate(loop, data_of)
    curves(loop, tuned, data_of)
    return tuned


def influence_scores(loop: Loop, candidates: Candidates) -> Scores:
    """Local data influence of each candidate on the warmed-up student."""
    config, name = loop.config, f"influence{candidates.suffix}"
    loop.stage(
        name,
        lambda work: influence(
            loop.states("warmup"),
            candidates.rows,
            config.data.reference,
            config.influence,
            work,
            num_reference=config.data.num_reference,
            mesh=make_mesh(config.mesh, "influence"),
        ),
        lines.scored,
        trains=True,
    )
    return Scores(loop.folder(f"{name}/scores.parquet"), "influence")


def loss_scores(loop: Loop, candidates: Candidates) -> Scores:
    """The warmed-up student's loss on each candidate: what it cannot do yet is preferred."""
    config, name = loop.config, f"losses{candidates.suffix}"

    def body(work: Work) -> Result:
        student = open_student(loop.states("warmup"), config.influence, make_mesh(config.mesh))
        return losses(
            student.loaded,
            candidates.rows,
            config.evaluation,
            work,
            fingerprint=student.fingerprint,
        )

    loop.stage(name, body, lines.losses_measured, trains=True)
    return Scores(loop.folder(f"{name}/scores.parquet"), "loss")


def random_scores(loop: Loop, candidates: Candidates) -> Scores:
    """A number for each candidate that knows nothing of it."""
    name = f"random{candidates.suffix}"
    loop.stage(name, lambda work: draws(candidates.rows, work), lines.drawn, alone=True)
    return Scores(loop.folder(f"{name}/scores.parquet"), "draw")


SIGNALS = {
    "influence": influence_scores,
    "judge": judge_scores,
    "training_loss": loss_scores,
    "random": random_scores,
}
