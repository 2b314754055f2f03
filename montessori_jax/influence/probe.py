"""What every estimator starts from: a student, its optimizer, a loss, and reference sets."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from montessori_jax.errors import UserError
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.scores import Candidate
from montessori_jax.influence.step import CandidateLoss, Params


@dataclass(frozen=True)
class Probe:
    """One student to be probed. An estimator is a function of this that returns a `Scorer`.

    Attributes:
        candidate_loss: ``(params, data) -> scalar``; hashable, or a pytree that can be called.
        params: the student's parameters, any pytree of float arrays.
        opt_state: the optimizer's state after the warm-up.
        tx: the optimizer, with the probe step's learning rate.
        references: reference sets by name; the first one's influence is a score's own.
        gradient_scale: candidate gradients are multiplied by it.
        block: candidates side by side on the device.
        chunk: most candidates a program run.
        pool: candidates that pilots are taken from, for estimators that fit something.
    """

    candidate_loss: CandidateLoss
    params: Params
    opt_state: optax.OptState
    tx: optax.GradientTransformation
    references: Mapping[str, Reference]
    gradient_scale: float = 1.0
    block: int = 1
    chunk: int = 16
    pool: Sequence[Candidate] = ()

    @property
    def blocks(self) -> int:
        """Blocks a program run."""
        return -(-self.chunk // self.block)

    def pilots(self, count: int) -> list[Candidate]:
        """``count`` candidates of the pool that have data, whatever the pool's order.

        They are chosen by the hash of their data: the same pool gives the same pilots, and so
        the same scores, in any order and in any chunks.

        Raises:
            UserError: the pool has no candidate with data.
        """
        usable = [one for one in self.pool if one.data is not None]
        if not usable:
            raise UserError(
                "this estimator fits pilot candidates, and there are none: give pool=candidates"
            )
        return sorted(usable, key=lambda one: content_hash(one.data))[:count]


def content_hash(data: Any) -> str:
    """Hash of a pytree's values, dtypes and shapes."""
    made = hashlib.sha256()
    for leaf in jax.tree.leaves(data):
        values = np.asarray(leaf)
        made.update(f"{values.dtype}{values.shape}".encode())
        made.update(values.tobytes())
    return made.hexdigest()
