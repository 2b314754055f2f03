"""Encoded chats as candidates and as a reference set, for this project's decoders."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from montessori_jax.data.chat import EncodedChat, fit
from montessori_jax.data.packing import Batch, assign_rows, bucket, count_targets, pack
from montessori_jax.errors import UserError
from montessori_jax.influence.memory import activation_bytes
from montessori_jax.influence.reference import Reduction, Reference, sample_weights
from montessori_jax.influence.scores import Candidate
from montessori_jax.models import Model, Params
from montessori_jax.training.losses import token_losses

# Activations up to this size are kept for the backward pass; beyond it they are recomputed, which
# costs a forward pass. By shape alone, so that a score does not depend on the memory at hand.
KEPT_ACTIVATIONS = 2 * 2**30
SHORTEST_CANDIDATE = 64
# Shorter rows waste less attention, longer ones less padding (measured: docs/log.md).
SHORTEST_ROW = 256


@partial(jax.tree_util.register_dataclass, data_fields=("model",), meta_fields=("dtype",))
@dataclass(frozen=True)
class TokenLosses:
    """``(params, batch) -> losses [rows, slots]`` of a decoder; equal ones share programs.

    A pytree: the arrays that a model holds (LoRA's base) are arguments of those programs.

    In float32 every product is float32 to the last bit (JAX's ``highest``): the default of GPUs
    (TF32) and TPUs (one bf16 pass) is coarser than the differences that influence is made of.
    """

    model: Model
    dtype: str = "float32"

    def __call__(self, params: Params, batch: Batch) -> Float[Array, "rows slots"]:
        kept = activation_bytes(self.model.config, *batch.tokens.shape) <= KEPT_ACTIVATIONS
        with jax.default_matmul_precision("default" if self.dtype == "bfloat16" else "highest"):
            return token_losses(
                self.model,
                params,
                batch,
                dtype=jnp.dtype(self.dtype),
                remat="none" if kept else "full",
            )


@partial(jax.tree_util.register_dataclass, data_fields=("losses",), meta_fields=())
@dataclass(frozen=True)
class MeanLoss:
    """``(params, batch) -> mean loss`` over a candidate's tokens; 0 without any."""

    losses: TokenLosses

    def __call__(self, params: Params, batch: Batch) -> Float[Array, ""]:
        losses = self.losses(params, batch)
        weights = batch.target_weights.astype(losses.dtype)
        return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def chat_candidate(
    id: str, chat: EncodedChat, max_length: int, *, coarse: bool = False
) -> Candidate:
    """A chat as one row; the response is cut at ``max_length`` tokens.

    Rows are 64, 96, 128, 192, ... tokens long, with ``coarse`` 64, 128, 256, ...: every length is
    one more program to compile, and padding costs `exact` little beside its reference pass.
    Without a response token left to learn from there are no data but a reason.
    """
    if not count_targets(chat):
        return Candidate(id, None, "the response has no tokens")
    fitted = fit(chat, max_length)
    if fitted is None:
        return Candidate(
            id,
            None,
            f"the prompt has {chat.prompt_length} tokens, which leaves no room for a response "
            f"below max_length {max_length}",
        )
    length = bucket(len(fitted.tokens), SHORTEST_CANDIDATE)
    slots = length
    if coarse:
        length = slots = 1 << (length - 1).bit_length()
    elif length >= 128 and count_targets(fitted) <= length // 2:
        # The head is a quarter of a small model's gradient: spare it what is no target.
        slots = length // 2
    return Candidate(id, pack([fitted], [[0]], row_length=length, slots=slots))


def chat_reference(
    model: Model,
    chats: Sequence[EncodedChat],
    *,
    reduction: Reduction = "sample",
    max_length: int = 1024,
    row_length: int = 0,
    rows_per_pass: int = 4,
    dtype: str = "float32",
    gradient_dtype: str = "float32",
) -> Reference:
    """Chats packed once into ``[passes, rows, length]``, many to a row; the head sees responses.

    Args:
        model: the student's decoder.
        chats: reference samples, in the order that ``batch8`` batches them.
        reduction: see `sample_weights`.
        max_length: tokens at which a response is cut.
        row_length: tokens a row; 0 takes the longest sample's bucket, at least 256.
        rows_per_pass: rows on the device at one time.
        dtype: compute dtype of the losses that are subtracted.
        gradient_dtype: compute dtype of the reference gradient.

    Raises:
        UserError: no sample has response tokens, or one is longer than ``row_length``.
    """
    fitted = {i: kept for i, chat in enumerate(chats) if (kept := fit(chat, max_length))}
    counts = np.array([count_targets(fitted[i]) if i in fitted else 0 for i in range(len(chats))])
    weights = sample_weights(counts, reduction)
    used = [i for i in fitted if counts[i]]
    samples = [fitted[i] for i in used]
    lengths = [len(chat.tokens) for chat in samples]
    longest = max(lengths)
    if row_length and longest > row_length:
        raise UserError(
            f"row_length {row_length}: a reference sample has {longest} tokens; raise row_length, "
            "or leave it at 0, which chooses"
        )
    width = row_length or bucket(max(longest, SHORTEST_ROW))
    layout = assign_rows(lengths, width)
    passes = -(-len(layout) // rows_per_pass)
    rows = -(-len(layout) // passes)
    most = max(sum(count_targets(samples[i]) for i in row) for row in layout)
    batch = pack(samples, layout, row_length=width, slots=-(-most // 8) * 8, rows=passes * rows)
    batch = jax.tree.map(lambda leaf: leaf.reshape(passes, rows, -1), batch)
    token_weights = weights[used][batch.target_samples] * (batch.target_weights > 0)
    losses = TokenLosses(model, dtype)
    return Reference(
        losses,
        jax.device_put(batch),
        token_weights,
        TokenLosses(model, gradient_dtype) if gradient_dtype != dtype else None,
    )
