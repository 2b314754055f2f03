"""Candidates through one compiled program: K side by side, blocks one after another."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from montessori_jax.influence.mesh import split_candidates
from montessori_jax.influence.scores import Candidate, Score, unmeasured

T = TypeVar("T")


def map_blocks(
    one: Callable[[Any, Any], T],
    shared: Any,
    data: Any,
    filled: Bool[Array, " blocks"],
    mesh: Mesh | None = None,
) -> T:
    """``one`` for every candidate: `jax.vmap` within a block, `jax.lax.map` over blocks.

    Memory is that of one block. Blocks that are not ``filled`` are skipped and give zeros, so a
    program made for many blocks serves fewer at no cost. With a mesh a block's candidates are
    split over its devices (`montessori_jax.influence.mesh`).

    Args:
        one: from what is shared and one candidate's data to a pytree of arrays.
        shared: what every candidate reads, the student above all; ``one`` captures no arrays.
        data: leaves ``[blocks, K, ...]``; K is a multiple of the devices that candidates have.
        filled: which blocks hold candidates.
        mesh: the devices, or None for one.

    Returns:
        What ``one`` returns, with leading axes ``[blocks, K]``.
    """

    def run(shared: Any, data: Any, filled: Array) -> T:
        block = jax.vmap(partial(one, shared))

        def empty(inputs: Any) -> T:
            shapes = jax.eval_shape(block, inputs)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return jax.lax.map(
            lambda pair: jax.lax.cond(pair[1], block, empty, pair[0]), (data, filled)
        )

    return split_candidates(run, mesh, axes=(None, 1, None), out_axis=1)(shared, data, filled)


def shape_key(data: Any) -> Any:
    """What a program is compiled for: the structure, shapes and dtypes of a pytree, hashable."""
    leaves, structure = jax.tree.flatten(data)
    return structure, tuple((np.shape(leaf), np.result_type(leaf)) for leaf in leaves)


def stack_blocks(rows: Sequence[Any], block: int, blocks: int) -> tuple[Any, np.ndarray]:
    """Stack equal-shaped pytrees to leaves ``[blocks, block, ...]``, and which blocks are filled.

    Unused places repeat the first row; ``rows[i]`` lies at ``[i // block, i % block]``.
    """
    padded = [*rows, *[rows[0]] * (block * blocks - len(rows))]
    data = jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(blocks, block, *np.shape(leaves[0])), *padded
    )
    return data, np.arange(blocks) * block < len(rows)


def score_in_blocks(
    candidates: Sequence[Candidate],
    *,
    score: Callable[[Sequence[Candidate], Any, np.ndarray], list[Score]],
    block: int,
    blocks: int,
    method: str,
) -> list[Score]:
    """Scores in the order of ``candidates``, those of equal shapes going through together.

    Args:
        candidates: any number, of any shapes; those without data get no influence.
        score: ``(members, data, filled) -> scores``, for at most ``block * blocks`` members whose
            data are stacked as `stack_blocks` does.
        block: candidates side by side.
        blocks: blocks a program run.
        method: the estimator's name.
    """
    groups: dict[Any, list[int]] = {}
    for index, one in enumerate(candidates):
        key = None if one.data is None else shape_key(one.data)
        groups.setdefault(key, []).append(index)
    scores: dict[int, Score] = {}
    for key, members in groups.items():
        if key is None:
            scores |= {index: unmeasured(candidates[index], method) for index in members}
            continue
        for start in range(0, len(members), block * blocks):
            part = members[start : start + block * blocks]
            ones = [candidates[index] for index in part]
            data, filled = stack_blocks([one.data for one in ones], block, blocks)
            scores |= dict(zip(part, score(ones, data, filled), strict=True))
    return [scores[index] for index in range(len(candidates))]
