"""What every estimator starts from: a student, its optimizer, a loss, and reference sets."""

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from montessori_jax.errors import UserError
from montessori_jax.influence.mesh import candidate_devices, laid_out
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.scores import Candidate
from montessori_jax.influence.step import CandidateLoss, Params
from montessori_jax.pytrees import as_argument, on_device


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
        block: candidates side by side, on all devices together.
        chunk: most candidates a program run.
        pool: candidates that pilots are taken from, for estimators that fit something.
        mesh: the devices that candidates are split over, whose number divides ``block``; None for
            one. Made by `on_mesh`.
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
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        # Every program run would take a copy of its own of NumPy's arrays.
        for name in ("params", "opt_state"):
            object.__setattr__(self, name, on_device(getattr(self, name)))

    @property
    def blocks(self) -> int:
        """Blocks a program run."""
        return -(-self.chunk // self.block)

    def on_mesh(self, mesh: Mesh | None) -> "Probe":
        """The same on several devices, with ``block`` candidates side by side on each.

        Weights, moments and references are laid out on the mesh once, here. What is done once for
        all candidates (reference gradients, pilots) is done on every device.
        """
        if mesh is None:
            return self
        return replace(
            self,
            candidate_loss=laid_out(as_argument(self.candidate_loss), mesh),
            params=laid_out(self.params, mesh),
            opt_state=laid_out(self.opt_state, mesh),
            references={name: one.on_mesh(mesh) for name, one in self.references.items()},
            block=self.block * candidate_devices(mesh),
            mesh=mesh,
        )

    def pilots(self, count: int) -> list[Candidate]:
        """``count`` candidates of the pool that have data, whatever the pool's order.

        They are chosen by the hash of their data: the same pool gives the same pilots, and so
        the same scores, in any order and in any chunks.

        Raises:
            UserError: the pool has no candidate with data.
        """
        usable = (one for one in self.pool if one.data is not None)
        chosen = heapq.nsmallest(count, usable, key=lambda one: content_hash(one.data))
        if not chosen:
            raise UserError(
                "this estimator fits pilot candidates, and there are none: give pool=candidates"
            )
        return chosen


def content_hash(data: Any) -> str:
    """Hash of a pytree's values, dtypes and shapes."""
    made = hashlib.sha256()
    for leaf in jax.tree.leaves(data):
        values = np.asarray(leaf)
        made.update(f"{values.dtype}{values.shape}".encode())
        made.update(values.tobytes())
    return made.hexdigest()
