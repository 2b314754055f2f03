"""Encoded chats as candidates and as a reference set, for this project's decoders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from montessori_jax.data.chat import EncodedChat, fit
from montessori_jax.data.lazy import LazySequence
from montessori_jax.data.packing import Batch, assign_rows, bucket, count_targets, pack
from montessori_jax.errors import UserError
from montessori_jax.influence.memory import activation_bytes
from montessori_jax.influence.precision import compute_dtype, matmul_precision
from montessori_jax.influence.reference import Reduction, Reference, sample_weights
from montessori_jax.influence.scores import Candidate
from montessori_jax.models import Model, Params
from montessori_jax.models.attention_kernels import BLOCK
from montessori_jax.training.losses import sum_by_sample, token_losses

# Activations up to this size are kept for the backward pass; beyond it they are recomputed, which
# costs a forward pass. By shape alone, so that a score does not depend on the memory at hand.
KEPT_ACTIVATIONS = 2 * 2**30
SHORTEST_CANDIDATE = 64
# Shorter rows waste less attention, longer ones less padding (measured: docs/log.md).
SHORTEST_ROW = 256
# Tokens of packed candidates that go through forward mode at one time.
TOKENS_TOGETHER = 4096


@partial(
    jax.tree_util.register_dataclass, data_fields=("model",), meta_fields=("dtype", "attention")
)
@dataclass(frozen=True)
class TokenLosses:
    """``(params, batch) -> losses [rows, slots]`` of a decoder; equal ones share programs.

    A pytree: where the model holds arrays of its own (an adapter's frozen base) they are arguments
    of the programs. ``dtype`` is ``float32``, ``bf16_split``, ``bfloat16`` (or ``float64``), see
    `montessori_jax.influence.precision`; ``attention`` names a kernel, and forward mode needs
    ``xla``.
    """

    model: Model
    dtype: str = "float32"
    attention: str = "xla"

    def __call__(self, params: Params, batch: Batch) -> Float[Array, "rows slots"]:
        kept = activation_bytes(self.model.config, *batch.tokens.shape) <= KEPT_ACTIVATIONS
        with jax.default_matmul_precision(matmul_precision(self.dtype)):
            return token_losses(
                self.model,
                params,
                batch,
                dtype=compute_dtype(self.dtype),
                remat="none" if kept else "full",
                attention=self.attention,
            )


class Packed(NamedTuple):
    """Many candidates in the rows of one batch; one number for each place of a sample.

    As `MeanLoss.together` gives it all leaves have a leading axis of parts, each with some of the
    rows; the samples are numbered through.
    """

    batch: Batch
    numbers: Int[Array, " samples"]


@partial(jax.tree_util.register_dataclass, data_fields=("losses",), meta_fields=())
@dataclass(frozen=True)
class MeanLoss:
    """``(params, batch) -> mean loss`` over a candidate's tokens; 0 without any."""

    losses: TokenLosses

    def __call__(self, params: Params, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(self.terms(params, batch))

    def terms(self, params: Params, batch: Batch) -> Float[Array, "rows slots"]:
        """What each target adds to the mean loss; 0 on fillers."""
        losses = self.losses(params, batch)
        weights = batch.target_weights.astype(losses.dtype)
        return losses * weights / jnp.maximum(jnp.sum(weights), 1.0)

    def together(
        self, data: Sequence[Batch], parts: int = 1, ways: int = 1
    ) -> Iterator[tuple[Packed, list[int]]]:
        """Candidates of `chat_candidate` packed again, many to a row, `TOKENS_TOGETHER` a part.

        Yields batches and, for the samples of each, their indices in ``data``. Few shapes: rows are
        256, 512, 1024, ... tokens long, and have targets in all or in three quarters; a part has
        ``ways`` of them or a multiple, which its devices split.
        """
        chats = [unpacked(one) for one in data]
        lengths = [len(chat.tokens) for chat in chats]
        width = 1 << (max([*lengths, SHORTEST_ROW]) - 1).bit_length()
        layout = assign_rows(lengths, width)
        most = parts * ways * max(1, TOKENS_TOGETHER // width // ways)
        for start in range(0, len(layout), most):
            rows = layout[start : start + most]
            members = [index for row in rows for index in row]
            places = {index: place for place, index in enumerate(members)}
            fullest = max(sum(count_targets(chats[index]) for index in row) for row in rows)
            batch = pack(
                [chats[index] for index in members],
                [[places[index] for index in row] for row in rows],
                row_length=width,
                slots=3 * width // 4 if fullest <= 3 * width // 4 else width,
                rows=min(most, parts * ways * bucket(-(-len(rows) // (parts * ways)), 1)),
            )
            batch = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
            numbers = np.tile(np.arange(bucket(len(data)), dtype=np.int32), (parts, 1))
            # NumPy's arrays; a program that takes them sees JAX's.
            yield Packed(batch, numbers), members  # type: ignore[arg-type]

    def each(self, params: Params, packed: Packed) -> Float[Array, " samples"]:
        """The mean loss of every packed candidate; 0 in places without one."""
        losses = self.losses(params, packed.batch)
        sums = sum_by_sample(losses, packed.batch, len(packed.numbers))
        return sums.total / jnp.maximum(sums.targets, 1.0)


def unpacked(data: Batch) -> EncodedChat:
    """The chat in a batch of one row and one sample."""
    length = int(np.count_nonzero(data.segment_ids[0]))
    targets = int(np.count_nonzero(data.target_weights[0]))
    return EncodedChat(np.asarray(data.tokens[0][:length]), length - targets)


def chat_candidate(
    id: str, chat: EncodedChat, max_length: int, *, coarse: bool = False, attention: str = "xla"
) -> Candidate:
    """A chat as one row; the response is cut at ``max_length`` tokens.

    Rows are 64, 96, 128, 192, ... tokens long, with ``coarse`` 64, 128, 256, ...: every length is
    one more program to compile, and padding costs `exact` little beside its reference pass. Where
    ``attention`` names a fused kernel they are whole blocks of it.
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
    if attention not in ("auto", "xla"):
        length += -length % BLOCK
    return Candidate(id, pack([fitted], [[0]], row_length=length, slots=slots))


@dataclass(frozen=True)
class ChatCandidates(LazySequence[Candidate]):
    """Chats as candidates (`chat_candidate`), padded when they are asked for and then forgotten."""

    chats: Sequence[EncodedChat]
    names: Sequence[str]
    max_length: int
    coarse: bool = False
    attention: str = "xla"

    def __len__(self) -> int:
        return len(self.chats)

    def make(self, index: int) -> Candidate:
        return chat_candidate(
            self.names[index],
            self.chats[index],
            self.max_length,
            coarse=self.coarse,
            attention=self.attention,
        )


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
    attention: str = "xla",
    gradient_attention: str = "xla",
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
        attention: kernel of the losses, see `TokenLosses`.
        gradient_attention: kernel of the gradient.

    Raises:
        UserError: no sample has response tokens, or one is longer than ``row_length``.
    """
    fitted = {i: kept for i, chat in enumerate(chats) if (kept := fit(chat, max_length))}
    counts = np.array([count_targets(fitted[i]) if i in fitted else 0 for i in range(len(chats))])
    weights = sample_weights(counts, reduction)
    used = [i for i in fitted if counts[i]]
    samples = [fitted[i] for i in used]
    longest = max(len(chat.tokens) for chat in samples)
    if row_length and longest > row_length:
        raise UserError(
            f"row_length {row_length}: a reference sample has {longest} tokens; raise row_length, "
            "or leave it at 0, which chooses"
        )
    losses = TokenLosses(model, dtype, attention)
    smooth = TokenLosses(model, gradient_dtype, gradient_attention)

    def of(indices: Sequence[int]) -> Reference:
        chosen = [samples[i] for i in indices]
        lengths = [len(chat.tokens) for chat in chosen]
        width = row_length or bucket(max([*lengths, SHORTEST_ROW]))
        layout = assign_rows(lengths, width)
        passes = -(-len(layout) // rows_per_pass)
        rows = -(-len(layout) // passes)
        most = max(sum(count_targets(chosen[i]) for i in row) for row in layout)
        batch = pack(chosen, layout, row_length=width, slots=-(-most // 8) * 8, rows=passes * rows)
        batch = jax.tree.map(lambda leaf: leaf.reshape(passes, rows, -1), batch)
        sample_weight = weights[[used[i] for i in indices]]
        return Reference(
            losses,
            jax.device_put(batch),
            sample_weight[batch.target_samples] * (batch.target_weights > 0),
            None if smooth == losses else smooth,
            batch.target_samples,
            lambda fewer: of([indices[i] for i in fewer]),
        )

    return of(range(len(samples)))
