"""Held-out reference loss: how well a student predicts responses it was not trained on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from montessori_jax.config import EvaluationConfig
from montessori_jax.data.chat import ChatFormat, EncodedChat
from montessori_jax.data.encode import encode_rows
from montessori_jax.data.own_parts import read_rows_together
from montessori_jax.data.packing import Batch, assign_rows, bucket, pack
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.evaluation.context import Context, Result
from montessori_jax.mesh import fetch, mesh_of, place_rows, row_ways, use_mesh
from montessori_jax.models import Model, Params
from montessori_jax.training.losses import sum_by_sample, token_losses


@dataclass(frozen=True)
class ReferenceLoss:
    """Losses in nats a response token, the end-of-turn token included.

    ``loss`` is the mean over samples of their mean token loss, ``standard_error`` that mean's (None
    for one sample);
    ``token_loss`` the mean over all tokens; ``by_sample`` one mean a row, in the file's order.
    """

    loss: float
    standard_error: float | None
    token_loss: float
    samples: int
    tokens: int
    by_sample: tuple[float, ...]

    def as_row(self) -> dict[str, Any]:
        row = asdict(self)
        row["by_sample"] = list(self.by_sample)
        return row


@partial(jax.jit, static_argnames=("samples", "dtype", "attention"))
def loss_sums(
    model: Model, params: Params, batch: Batch, samples: int, dtype: str, attention: str
) -> Any:
    losses = token_losses(model, params, batch, dtype=jnp.dtype(dtype), attention=attention)
    return sum_by_sample(losses, batch, samples)


def reference_loss(
    model: Model,
    params: Params,
    chats: Sequence[EncodedChat],
    settings: EvaluationConfig,
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> ReferenceLoss:
    """Measure it: packed rows, sums in float64 on the host, divided once.

    Args:
        model: the decoder.
        params: its parameters.
        chats: encoded held-out rows, each with at least one response token.
        settings: compute dtype and how many rows are on the device at one time.
        progress: told how many samples each pass finished.
    """
    lengths = [len(chat.tokens) for chat in chats]
    row_length = bucket(max(lengths))
    layout = assign_rows(lengths, row_length)
    mesh = mesh_of(params)
    ways = row_ways(mesh)
    step = min(settings.rows_per_pass, -(-len(layout) // ways)) * ways
    slots = bucket(
        max(sum(len(chats[i].tokens) - chats[i].prompt_length for i in row) for row in layout)
    )
    total, count = np.zeros(len(chats)), np.zeros(len(chats))
    for start in range(0, len(layout), step):
        part = layout[start : start + step]
        batch = pack(chats, part, row_length=row_length, slots=slots, rows=step)
        options = {"dtype": settings.dtype, "attention": settings.attention}
        batch = place_rows(batch, mesh, axis=0)
        with use_mesh(mesh):
            sums = fetch(loss_sums(model, params, batch, len(chats), **options))
        total += np.asarray(sums.total, np.float64)
        count += np.asarray(sums.targets, np.float64)
        progress(sum(len(row) for row in part))
    means = total / count
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return ReferenceLoss(
        loss=float(np.mean(means)),
        standard_error=None if spread is None else spread / math.sqrt(len(means)),
        token_loss=float(total.sum() / count.sum()),
        samples=len(chats),
        tokens=int(count.sum()),
        by_sample=tuple(float(value) for value in means),
    )


def heldout_loss(context: Context) -> Result:
    """The evaluation ``reference_loss``: of the context's held-out rows; counts its cost.

    ``skipped`` of the result are the rows that were not used, by cause.
    """
    student, settings, work = context.student, context.settings, context.work
    encoded = encode_rows(
        read_rows_together(context.heldout),
        ChatFormat.of(student),
        settings.max_length,
        limit=context.num_heldout,
    )
    advice = f"lower rows_per_pass (now {settings.rows_per_pass})"
    with (
        fits_in_memory("reference_loss", advice),
        work.bar(len(encoded.chats), "row", "reference_loss") as bar,
        work.profile(1, 3) as profile,
    ):
        profile.begin(len(encoded.chats))

        def passed(count: int) -> None:
            bar.update(count)
            profile.passed()
            work.check_stop()

        found = reference_loss(
            student.model, student.params, encoded.chats, settings, progress=passed
        )
    work.meter.count(
        scored_tokens=encoded.tokens,
        flops=2.0 * student.model.parameter_count() * encoded.tokens,
    )
    return {**found.as_row(), "skipped": encoded.causes()}
