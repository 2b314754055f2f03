"""The reference set: fixed batches, a loss for each token, and one number made of them.

All reductions are linear in the token losses, so each is a weight for every token:
``L_ref = sum_t weight_t loss_t``. Losses are subtracted token by token before they are weighted
and added up, in float64 on the host: the differences are a millionth of the losses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from montessori_jax.errors import UserError
from montessori_jax.influence.mesh import laid_out, over_passes, place_reference
from montessori_jax.influence.step import Params
from montessori_jax.mesh import Places, fetch, in_places, places_of
from montessori_jax.pytrees import as_argument

Reduction = Literal["sample", "token", "batch8"]
# (params, one batch) -> the losses of its tokens. Hashable or a pytree, as a `CandidateLoss` is.
BatchLosses = Callable[[Params, Any], Array]


def sample_weights(
    counts: Int[np.ndarray, " samples"], reduction: Reduction
) -> Float[np.ndarray, " samples"]:
    """The weight of each token of a sample in the reference loss, float64.

    With ``n_s`` tokens in sample ``s``: ``sample`` is ``1 / (S n_s)``, the mean over samples of
    their mean token loss; ``token`` is ``1 / sum n``; ``batch8`` is the public code's, the mean
    over consecutive batches of 8 samples of the batch's token mean. Samples without tokens have
    no say.
    """
    if not counts.sum():
        raise UserError("reference: no sample has response tokens: check its rows and max_length")
    if reduction == "token":
        return np.full(len(counts), 1.0 / counts.sum())
    batch = np.arange(len(counts)) // (8 if reduction == "batch8" else 1)
    tokens = np.bincount(batch, weights=counts)
    return 1.0 / (np.count_nonzero(tokens) * np.maximum(tokens, 1.0))[batch]


def require_finite(loss: float) -> None:
    """Stop where no influence can be measured: the reference loss itself is broken."""
    if not math.isfinite(loss):
        raise UserError(
            f"the reference loss is {loss} before any step: check the student's weights and the "
            "reference rows"
        )


@dataclass(frozen=True)
class Reference:
    """Reference batches, one after another on the device, and the weights of their tokens.

    Attributes:
        losses_of_batch: ``(params, batch) -> token losses`` in nats, any shape.
        batches: pytree with leaves ``[passes, ...]``; one slice is a batch.
        weights: float64 ``[passes, *tokens]``, zero on fillers.
        gradient_losses_of_batch: the same losses as the reference gradient sees them, for example
            computed in bf16; by default ``losses_of_batch``.
        samples: which sample each token belongs to, 0, 1, ..., of the weights' shape; by default
            each token is a sample of its own. What `control_variate` draws and `less` averages.
        select: makes a reference of some samples alone, with their weights as they are here; by
            default the passes that hold any of them, the other samples' weights being zero.
    """

    losses_of_batch: BatchLosses
    batches: Any
    weights: Float[np.ndarray, " passes *tokens"] = field(repr=False)
    gradient_losses_of_batch: BatchLosses | None = None
    samples: Int[np.ndarray, " passes *tokens"] | None = field(default=None, repr=False)
    select: Callable[[Sequence[int]], "Reference"] | None = field(default=None, repr=False)

    def loss(self, token_losses: Float[np.ndarray, " passes *tokens"]) -> float:
        """``sum_t weight_t loss_t`` in float64."""
        counted = self.weights > 0
        return float(np.dot(self.weights[counted], token_losses[counted].astype(np.float64)))

    def difference(
        self,
        before: Float[np.ndarray, " passes *tokens"],
        after: Float[np.ndarray, " passes *tokens"],
    ) -> float:
        """``L_ref(before) - L_ref(after)``, subtracted token by token in float64."""
        return self.loss(before.astype(np.float64) - after.astype(np.float64))

    @property
    def count(self) -> int:
        """The number of samples that have a say."""
        return int(self._owners().max()) + 1

    def by_sample(
        self, token_values: Float[np.ndarray, " passes *tokens"]
    ) -> Float[np.ndarray, " samples"]:
        """``sum_t weight_t value_t`` over each sample's tokens, in float64."""
        counted = self.weights > 0
        values = self.weights[counted] * token_values[counted].astype(np.float64)
        return np.bincount(self._owners(), weights=values, minlength=self.count)

    def part(self, indices: Sequence[int]) -> "Reference":
        """Some samples alone, numbered 0, 1, ... in the order of ``indices``."""
        if self.select is not None:
            return self.select(indices)
        numbers = np.full(self.count, -1)
        numbers[np.asarray(indices)] = np.arange(len(indices))
        new = np.full(self.weights.shape, -1)
        new[self.weights > 0] = numbers[self._owners()]
        held = np.flatnonzero((new >= 0).reshape(len(new), -1).any(axis=1))
        return Reference(
            self.losses_of_batch,
            jax.tree.map(lambda leaf: leaf[held], self.batches),
            np.where(new >= 0, self.weights, 0.0)[held],
            self.gradient_losses_of_batch,
            np.maximum(new, 0)[held],
        )

    def on_mesh(self, mesh: Mesh) -> "Reference":
        """The same with its batches, and its losses' own arrays, on a mesh; its parts too."""
        select, smooth = self.select, self.gradient_losses_of_batch
        return replace(
            self,
            losses_of_batch=laid_out(as_argument(self.losses_of_batch), mesh),
            batches=place_reference(self.batches, mesh),
            gradient_losses_of_batch=smooth and laid_out(as_argument(smooth), mesh),
            select=select and (lambda indices: select(indices).on_mesh(mesh)),
        )

    def _owners(self) -> Int[np.ndarray, " counted"]:
        """The sample of each token that counts."""
        counted = self.weights > 0
        if self.samples is None:
            return np.arange(np.count_nonzero(counted))
        return self.samples[counted]

    def losses(self, params: Params) -> Float[np.ndarray, " passes *tokens"]:
        """Every token's loss, on the host, by one compiled program whatever the parameters."""
        return fetch(_losses(as_argument(self.losses_of_batch), params, self.batches))

    def gradient(self, params: Params) -> Params:
        """Gradient of the reference loss, added up batch by batch: memory of one batch."""
        return gradient_program(
            self._smooth(), params, self.batches, self.weights, places=places_of(params)
        )

    def hvp(self, params: Params, vector: Params) -> Params:
        """``H v`` with the reference loss's Hessian at ``params``: forward over reverse.

        The derivative of `gradient` along ``vector`` (Pearlmutter 1994), batch by batch; about two
        gradients in time and in activations.
        """
        return _hvp(
            self._smooth(), params, self.batches, self.weights, vector, places=places_of(params)
        )

    def _smooth(self) -> BatchLosses:
        return as_argument(self.gradient_losses_of_batch or self.losses_of_batch)


def batch_by_batch(losses: BatchLosses, params: Params, batches: Any) -> Array:
    """Token losses ``[passes, *tokens]``, one pass on the device at a time."""
    return jax.lax.map(partial(losses, params), batches)


_losses = jax.jit(batch_by_batch)


def gradient_of(
    losses: BatchLosses, params: Params, batches: Any, weights: Array, places: Places = None
) -> Params:
    """Gradient of ``sum_t weight_t loss_t``, added up batch by batch.

    ``places`` (of the parameters) are where the sum lies: left alone, the compiler may give every
    device all of it. On their mesh the batches are dealt out to the candidates' places, which talk
    once, at the end.
    """

    def weighted(losses: BatchLosses, params: Params, batch: Any, weights: Array) -> Array:
        values = losses(params, batch)
        # Fillers are chosen away, as a filler's infinite loss times zero would be NaN.
        return jnp.sum(jnp.where(weights > 0, values * weights.astype(values.dtype), 0))

    def summed(losses: BatchLosses, params: Params, batches: Any, weights: Array) -> Params:
        def add(total: Params, inputs: tuple[Any, Array]) -> tuple[Params, None]:
            gradient = jax.grad(partial(weighted, losses))(params, *inputs)
            return in_places(jax.tree.map(jnp.add, total, gradient), places), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (batches, weights))[0]

    mesh = places[0].mesh if places else None
    return over_passes(summed, mesh)(losses, params, batches, weights)


gradient_program = jax.jit(gradient_of, static_argnames="places")


@partial(jax.jit, static_argnames="places")
def _hvp(
    losses: BatchLosses,
    params: Params,
    batches: Any,
    weights: Array,
    vector: Params,
    places: Places = None,
) -> Params:
    def gradient(params: Params) -> Params:
        return gradient_of(losses, params, batches, weights, places)

    return jax.jvp(gradient, (params,), (vector,))[1]


def single_batch(
    losses: Callable[[Params], Array], weights: Float[np.ndarray, "*tokens"]
) -> Reference:
    """A reference from a plain ``params -> token losses``, everything in one pass."""
    return Reference(
        lambda params, _: losses(params), np.zeros((1,), np.int32), np.asarray(weights)[None]
    )
