"""Which samples an optimizer step takes, and the shapes they are laid out in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from montessori_jax.data.packing import assign_rows, bucket, shared_buckets
from montessori_jax.seeding import derive_seed

# Steps that a row length must serve to be worth a program of its own: compiling one takes about
# as long as this many small steps (measured: benchmarks/training.py).
WORTH_COMPILING = 16
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Shape:
    """What a compiled step depends on: ``[micro_batches, rows, row_length]`` and target slots."""

    micro_batches: int
    rows: int
    row_length: int
    slots: int


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: its samples by micro-batch and row, and the shape they are padded to."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    shape: Shape


def step_samples(seed: int, samples: int, batch_size: int, epochs: int) -> list[list[int]]:
    """The samples of every step, in order; an epoch's last step takes what is left of it.

    Keyed by ``(seed, epoch)``: what a step holds does not depend on where a run was resumed.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        generator = np.random.default_rng(derive_seed(seed, "order", epoch))
        order = generator.permutation(samples).tolist()
        steps += [order[at : at + batch_size] for at in range(0, samples, batch_size)]
    return steps


def plan_steps(
    steps: Sequence[Sequence[int]],
    lengths: Sequence[int],
    targets: Sequence[int],
    micro_batch: int,
    *,
    share_rows: bool,
    worth: int = WORTH_COMPILING,
    ways: int = 1,
) -> list[StepPlan]:
    """Lay every step's samples out in rows and micro-batches, in as few shapes as is cheap.

    Args:
        steps: sample indices of each step.
        lengths: tokens of each sample.
        targets: tokens of each sample that the loss falls on.
        micro_batch: rows on a device at one time, at most.
        share_rows: several samples may share a row; otherwise each has its own.
        worth: see `shared_buckets`.
        ways: into how many parts devices split a micro-batch's rows (`montessori_jax.mesh`); it
            divides the rows of each.

    Returns:
        A plan a step. Those of one row length have one shape; micro-batches that a step does not
        need are empty, and `accumulate` does not run them.
    """
    wanted = shared_buckets([max(lengths[i] for i in step) for step in steps], worth)
    layouts: list[list[list[int]]] = []
    for step, row_length in zip(steps, wanted, strict=True):
        if share_rows:
            assigned = assign_rows([lengths[i] for i in step], row_length)
            layouts.append([[step[i] for i in row] for row in assigned])
        else:
            layouts.append([[i] for i in step])
    shapes: dict[int, Shape] = {}
    for size in set(wanted):
        mine = [layout for layout, length in zip(layouts, wanted, strict=True) if length == size]
        most = max(len(layout) for layout in mine)
        rows = min(micro_batch, -(-most // ways)) * ways
        slots = max(sum(targets[i] for i in row) for layout in mine for row in layout)
        shapes[size] = Shape(-(-most // rows), rows, size, min(size, bucket(slots)))
    plans = []
    for layout, size in zip(layouts, wanted, strict=True):
        rows = shapes[size].rows
        cut = [layout[at : at + rows] for at in range(0, len(layout), rows)]
        plans.append(
            StepPlan(tuple(tuple(tuple(row) for row in part) for part in cut), shapes[size])
        )
    return plans


def stack(plan: StepPlan, pack_rows: Callable[[Sequence[Sequence[int]], Shape], Tree]) -> Tree:
    """The step's micro-batches on a leading axis, empty ones last.

    ``pack_rows(rows, shape)`` packs one micro-batch, given the sample indices of its rows.
    """
    missing = plan.shape.micro_batches - len(plan.micro_batches)
    parts = [pack_rows(rows, plan.shape) for rows in (*plan.micro_batches, *[()] * missing)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
