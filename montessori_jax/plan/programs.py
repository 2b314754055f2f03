"""The compiled programs of every stage, built from the functions that run, on shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from montessori_jax.config import TrainingConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import Batch, bucket, pack
from montessori_jax.evaluation.reference_loss import loss_sums
from montessori_jax.mesh import row_ways
from montessori_jax.models import Model
from montessori_jax.plan.shapes import (
    Planned,
    by_rows,
    train_state,
    trained_model,
    weights,
)
from montessori_jax.stages.losses import CHUNK
from montessori_jax.training import loop
from montessori_jax.training.batches import Shape, StepPlan, plan_steps, stack
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.pairs import PairBatch, pack_pairs
from montessori_jax.training.reference_log_probs import batch_log_probs
from montessori_jax.training.steps import dpo_step, sft_step

STEPS = 100  # of a schedule; a step's program is the same for any number


@dataclass(frozen=True)
class Program:
    """One program of a stage, and what is known of it without compiling.

    Attributes:
        stage: its group of stages (`montessori_jax.plan.stages.GROUPS`), several joined by ``+``.
        name: what it does there.
        unit: what one run of it does.
        trace: its trace for the target, as the stage itself would make it.
        mesh: the chips that it is traced for.
        runs: how often an iteration of the loop runs it.
        model_flops: of one run by the analytic count, ``2 N`` a token forward and ``6 N`` with a
            gradient: attention and what is recomputed left out.
        trips: of loops whose count only the data tell, the outermost first.
        beside: bytes a chip holds during the stage that are no argument of the program.
        read: bytes of weights that a chip reads in one run where that, and not arithmetic, is what
            takes time (decoding); else 0.
        lower: the settings that make it smaller, the first one first.
        stages: the loop's stages that run it, and how often each does; together ``runs``.
    """

    stage: str
    name: str
    unit: str
    trace: Callable[[], Any]
    mesh: jax.sharding.Mesh
    runs: float
    model_flops: float
    trips: tuple[int, ...] = ()
    beside: int = 0
    read: int = 0
    lower: tuple[str, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)


def sft_program(planned: Planned, stage: str, tokens: float) -> Program:
    """One optimizer step of supervised fine-tuning, every row full.

    Args:
        planned: settings, models and meshes.
        stage: ``sft``, ``warmup`` or ``bootstrap`` (of the teacher): the section of the settings.
        tokens: that an iteration trains on.
    """
    settings, mesh = getattr(planned.config, stage), planned.training
    trained = planned.teacher if stage == "bootstrap" else planned.student
    model = trained_model(trained, settings, mesh)
    shape = _full_rows(settings, mesh, settings.max_length)

    def pack_rows(rows: Any, shape: Shape) -> Batch:
        return pack([], [], row_length=shape.row_length, slots=shape.slots, rows=shape.rows)

    batch = stack(StepPlan((), shape), pack_rows)
    tx = make_optimizer(settings, STEPS)

    def trace() -> Any:
        return _step_trace(sft_step(model, tx, settings), train_state(tx, model, mesh), batch, mesh)

    each = shape.micro_batches * shape.rows * shape.row_length
    return Program(
        stage,
        "step",
        f"an optimizer step: {shape.micro_batches} x {shape.rows} rows of {shape.row_length}",
        trace,
        mesh,
        runs=tokens / each,
        model_flops=_training_flops(model, settings) * each,
        trips=(shape.micro_batches,),
        lower=_smaller(stage, settings),
    )


def dpo_programs(planned: Planned, pairs: float) -> list[Program]:
    """The reference's log-probs of a pass of pairs, and one optimizer step; for so many pairs."""
    config, mesh = planned.config, planned.training
    settings = config.dpo
    model = trained_model(planned.teacher, settings, mesh)
    # A pair is a row: its prompt, then both responses.
    shape = _full_rows(settings, mesh, 2 * settings.max_length)
    tx = make_optimizer(settings, STEPS)

    def pack_rows(rows: Any, shape: Shape) -> PairBatch:
        return pack_pairs([], [], row_length=shape.row_length, slots=shape.slots, rows=shape.rows)

    batch = stack(StepPlan((), shape), pack_rows)

    def log_probs() -> Any:
        one = jax.tree.map(lambda leaf: leaf[0], batch)
        with jax.set_mesh(mesh):
            return batch_log_probs.trace(
                model,
                weights(model, mesh),
                by_rows(one, mesh, 0),
                settings.dtype,
                settings.attention,
            )

    def step() -> Any:
        return _step_trace(dpo_step(model, tx, settings), train_state(tx, model, mesh), batch, mesh)

    rows = f"{shape.rows} rows of {shape.row_length}, a pair each"
    filled = min(settings.batch_size, shape.rows)
    # A step takes its batch, however many rows the chips could have.
    idle = f" ({filled} of the rows hold one: dpo.batch_size)" if filled < shape.rows else ""
    each = shape.rows * shape.row_length
    return [
        Program(
            "dpo",
            "reference log-probs",
            f"a pass: {rows}",
            log_probs,
            mesh,
            runs=pairs / shape.rows,
            model_flops=2 * model.parameter_count() * each,
            lower=("dpo.micro_batch", "dpo.max_length"),
        ),
        Program(
            "dpo",
            "step",
            f"an optimizer step: {shape.micro_batches} x {rows}{idle}",
            step,
            mesh,
            runs=pairs / settings.batch_size,
            model_flops=_training_flops(model, settings) * each * shape.micro_batches,
            trips=(shape.micro_batches,),
            lower=_smaller("dpo", settings),
        ),
    ]


def evaluation_program(planned: Planned, tokens: float, warm: bool = False) -> Program:
    """One pass of rows whose loss is measured.

    Args:
        planned: settings, models and meshes.
        tokens: of all rows of an iteration.
        warm: on the student as its warm-up left it, in float32 and in the chunks of the stage
            ``losses``; else as an evaluation loads it, on the held-out rows.
    """
    settings, mesh = planned.config.evaluation, planned.training
    model, samples = Model(planned.student), planned.config.data.num_heldout
    if warm:
        model, samples = trained_model(planned.student, planned.config.warmup, mesh), CHUNK
    rows, length = settings.rows_per_pass * row_ways(mesh), bucket(settings.max_length)
    batch = pack([], [], row_length=length, slots=length, rows=rows)
    dtype = "bfloat16" if settings.dtype == "bfloat16" and not warm else "float32"

    def trace() -> Any:
        with jax.set_mesh(mesh):
            return loss_sums.trace(
                model,
                weights(model, mesh, dtype),
                by_rows(batch, mesh, 0),
                samples,
                dtype=settings.dtype,
                attention=settings.attention,
            )

    return Program(
        "losses" if warm else "evaluation",
        "warmed-up student's losses" if warm else "reference loss",
        f"a pass: {rows} rows of {length}",
        trace,
        mesh,
        runs=max(1.0, tokens / (rows * length)),
        model_flops=2 * model.parameter_count() * rows * length,
        lower=("evaluation.rows_per_pass", "evaluation.max_length"),
    )


def chats_of(count: int, tokens: int, prompt: int, longest: int = 0) -> list[EncodedChat]:
    """Encoded chats of no particular text; the first one is ``longest`` tokens long."""
    sizes = [longest or tokens] + [tokens] * (count - 1)
    return [EncodedChat(np.zeros(size, np.int32), min(prompt, size - 1)) for size in sizes]


def _step_trace(step: Any, state: Any, batch: Any, mesh: jax.sharding.Mesh) -> Any:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        return loop.step_program(mesh, shardings).trace(step, state, by_rows(batch, mesh, 1))


def _full_rows(settings: TrainingConfig, mesh: jax.sharding.Mesh, length: int) -> Shape:
    """The largest shape of a step: every sample as long as a row, every token a target."""
    size = settings.batch_size
    [plan] = plan_steps(
        [list(range(size))],
        [length] * size,
        [length] * size,
        settings.micro_batch,
        share_rows=False,
        ways=row_ways(mesh),
    )
    return plan.shape


def _training_flops(model: Model, settings: TrainingConfig) -> float:
    """A token: ``6 N``; ``4 N`` with adapters, for frozen weights have no gradient."""
    return (4 if settings.lora_rank else 6) * model.parameter_count()


def _smaller(stage: str, settings: TrainingConfig) -> tuple[str, ...]:
    """Settings that make a training step smaller, those that cost least first."""
    first = [] if settings.remat == "full" else [f"{stage}.remat=full"]
    if settings.micro_batch > 1:
        first.append(f"{stage}.micro_batch")
    weights = [] if settings.lora_rank else [f"{stage}.lora_rank"]
    return (*first, "mesh.fsdp", *weights, f"{stage}.max_length")
