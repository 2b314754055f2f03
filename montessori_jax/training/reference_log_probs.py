"""The reference model's log-probs of preference pairs: computed once, kept on disk.

The reference is the policy before its first step, so they come from the same parameters and no
second model is ever in memory.
"""

import hashlib
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from montessori_jax import cluster
from montessori_jax.config import DpoConfig
from montessori_jax.data.packing import count_targets
from montessori_jax.data.writing import open_atomically
from montessori_jax.errors import Interrupted
from montessori_jax.mesh import fetch, mesh_of, place_rows, row_ways, use_mesh
from montessori_jax.models import Model, Params
from montessori_jax.runs import value_hash
from montessori_jax.training.batches import plan_steps
from montessori_jax.training.loop import nothing
from montessori_jax.training.losses import token_losses
from montessori_jax.training.pairs import EncodedPair, PairBatch, fit_pair, pack_pairs

# Between two writes of what is computed so far.
SAVE_SECONDS = 60.0


def pair_log_probs(
    model: Model,
    params: Params,
    pairs: Sequence[EncodedPair],
    settings: DpoConfig,
    *,
    progress: Callable[[int, int], None] = nothing,
    stop_requested: Callable[[], bool] = lambda: False,
    known: Mapping[int, np.ndarray] | None = None,
    after: Callable[[Mapping[int, np.ndarray]], None] = nothing,
) -> list[np.ndarray]:
    """For each pair the log-prob in nats of every response token, chosen's then rejected's.

    Float32 arrays as long as the two responses together, each cut at ``settings.max_length``; an
    empty one for a pair that `train_dpo` leaves out because its prompt alone is that long.

    ``known`` has those of pairs, by their places, that were computed before; passes of none but
    such are left out. ``after`` is given all that is known after each pass.

    Raises:
        Interrupted: a stop was asked for between two passes.
    """
    fitting = [fit_pair(pair, settings.max_length) for pair in pairs]
    kept = {index: pair for index, pair in enumerate(fitting) if pair is not None}
    found = {place: np.zeros(0, np.float32) for place in range(len(pairs)) if place not in kept}
    found |= known or {}
    # Sorted, so that rows of one pass pad little; in passes of micro_batch pairs.
    order = sorted(kept, key=lambda index: (kept[index].length, index))
    mesh = mesh_of((model, params))
    size = settings.micro_batch * row_ways(mesh)
    passes = [order[at : at + size] for at in range(0, len(order), size)]
    lengths = [0 if pair is None else pair.length for pair in fitting]
    targets = [0 if pair is None else pair.targets for pair in fitting]
    plans = plan_steps(
        passes, lengths, targets, settings.micro_batch, share_rows=False, ways=row_ways(mesh)
    )
    done = 0
    progress(done, len(order))
    for members, plan in zip(passes, plans, strict=True):
        done += len(members)
        if all(index in found for index in members):
            progress(done, len(order))
            continue
        shape = plan.shape
        batch = pack_pairs(
            [kept[i] for i in members],
            row_length=shape.row_length,
            slots=shape.slots,
            rows=shape.rows,
        )
        batch = place_rows(batch, mesh, axis=0)
        with use_mesh(mesh):
            made = batch_log_probs(model, params, batch, settings.dtype, settings.attention)
        log_probs = fetch(made)
        for row, index in enumerate(members):
            found[index] = np.asarray(log_probs[row, : targets[index]], np.float32)
        progress(done, len(order))
        after(found)
        if done < len(order) and cluster.any_of(stop_requested()):
            raise Interrupted(f"stopped after {done} of {len(order)} pairs")
    return [found[place] for place in range(len(pairs))]


@partial(jax.jit, static_argnames=("dtype", "attention"))
def batch_log_probs(
    model: Model, params: Params, pairs: PairBatch, dtype: str, attention: str
) -> jax.Array:
    return -token_losses(model, params, pairs.batch, dtype=jnp.dtype(dtype), attention=attention)


def reference_log_probs(
    model: Model,
    params: Params,
    pairs: Sequence[EncodedPair],
    settings: DpoConfig,
    *,
    cache: Path,
    fingerprints: Sequence[str],
    say: Callable[[str], None] = nothing,
    progress: Callable[[int, int], None] = nothing,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[np.ndarray]:
    """`pair_log_probs`, from ``cache`` if that was computed from the same things.

    Args:
        model: the decoder.
        params: the reference model's parameters; not read when the cache holds.
        pairs: encoded pairs.
        settings: decide lengths, compute dtype and attention kernel.
        cache: an ``.npz`` file, written atomically and replaced when stale or damaged; written
            every minute and when the pass ends, however it does.
        fingerprints: of the model's weights and of its tokenizer.
        say: told in one line why a cache is not used.
        progress: given ``(pairs done, pairs in all)``.
        stop_requested: asked between passes.
    """
    key = value_hash(
        [
            *fingerprints,
            repr(model.config),
            settings.dtype,
            settings.attention,
            settings.max_length,
            _content(pairs),
        ]
    )
    sizes = [
        0 if fitted is None else fitted.targets
        for fitted in (fit_pair(pair, settings.max_length) for pair in pairs)
    ]
    known: dict[int, np.ndarray] = {}
    if cache.exists():
        try:
            known = _read(cache, key, sizes)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            say(f"{cache.name}: reference log-probs are computed again: {error}")
    if len(known) == len(pairs):
        return [known[place] for place in range(len(pairs))]
    found, written = known, time.monotonic()

    def keep(so_far: Mapping[int, np.ndarray]) -> None:
        nonlocal found, written
        found = dict(so_far)
        if time.monotonic() - written > SAVE_SECONDS:
            _write(cache, key, found)
            written = time.monotonic()

    try:
        return pair_log_probs(
            model, params, pairs, settings, progress=progress, stop_requested=stop_requested,
            known=known, after=keep,
        )  # fmt: skip
    finally:  # also what there is when it is stopped
        _write(cache, key, found)


def _content(pairs: Sequence[EncodedPair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr((pair.id, pair.chosen.prompt_length)).encode())
        for chat in (pair.chosen, pair.rejected):
            digest.update(np.int64(count_targets(chat)).tobytes())
            digest.update(np.ascontiguousarray(chat.tokens, np.int32).tobytes())
    return digest.hexdigest()


def _read(cache: Path, key: str, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """By the pair's place, those that are there."""
    # Opened here, as numpy leaves a file open that is no archive.
    with open(cache, "rb") as content, np.load(content, allow_pickle=False) as file:
        if str(file["key"]) != key:
            raise ValueError("they were of another model, tokenizer, data or setting")
        # The archive's CRC-32 is checked as these are read.
        places, values = [int(place) for place in file["pairs"]], file["log_probs"]
    if not all(0 <= place < len(sizes) for place in places):
        raise ValueError("they are of more pairs")
    ends = np.cumsum([sizes[place] for place in places], dtype=np.int64)
    if values.shape != (ends[-1] if len(ends) else 0,) or values.dtype != np.float32:
        raise ValueError("their number does not match the pairs")
    return dict(zip(places, np.split(values, ends[:-1]), strict=True)) if places else {}


def _write(cache: Path, key: str, values: Mapping[int, np.ndarray]) -> None:
    places = np.asarray(sorted(values), np.int64)
    joined = [np.zeros(0, np.float32), *(values[place] for place in places)]
    with open_atomically(cache) as file:
        np.savez(file, key=np.asarray(key), pairs=places, log_probs=np.concatenate(joined))
