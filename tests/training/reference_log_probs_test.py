"""Reference log-probs: transformers' numbers, computed once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from montessori_jax.config import DpoConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.errors import Interrupted
from montessori_jax.training.pairs import EncodedPair
from montessori_jax.training.reference_log_probs import pair_log_probs, reference_log_probs
from tests.training import samples

SETTINGS = DpoConfig(micro_batch=3, max_length=24)
NAMES = ("model", "tokenizer")


def test_they_are_those_of_transformers_in_the_order_given() -> None:
    model, params, theirs = samples.twins()
    pairs = samples.pairs(7)
    seen: list[tuple[int, int]] = []
    found = pair_log_probs(model, params, pairs, SETTINGS, progress=lambda *done: seen.append(done))
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)]
    for pair, row in zip(pairs, found, strict=True):
        with torch.no_grad():
            expected = torch.cat(
                [samples.torch_log_probs(theirs, chat) for chat in (pair.chosen, pair.rejected)]
            )
        assert row.dtype == np.float32
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_they_are_computed_once(tmp_path: Path) -> None:
    model, params = samples.student()
    pairs = samples.pairs(4)
    cache = tmp_path / "deeper" / "log_probs.npz"
    said: list[str] = []

    def ask(pairs: Any = pairs, settings: Any = SETTINGS, names: Any = NAMES, to: Any = params):
        return reference_log_probs(
            model, to, pairs, settings, cache=cache, fingerprints=names, say=said.append
        )

    first = ask()
    # Without parameters nothing can be computed.
    again = ask(to=None)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert again[0].dtype == np.float32
    # What does not change them does not make them stale.
    ask(to=None, settings=replace(SETTINGS, beta=0.3, learning_rate=1e-3, micro_batch=1))
    assert said == []
    other = EncodedPair("pair0", pairs[0].rejected, pairs[0].chosen)
    swapped = EncodedChat(pairs[0].chosen.tokens[::-1].copy(), pairs[0].chosen.prompt_length)
    assert not np.array_equal(swapped.tokens, pairs[0].chosen.tokens)
    for changes in (
        {"names": ("other", "tokenizer")},
        {"names": ("model", "other")},
        {"pairs": [other, *pairs[1:]]},
        {"pairs": pairs[:3]},
        {"settings": replace(SETTINGS, dtype="bfloat16")},
        {"settings": replace(SETTINGS, max_length=16)},
    ):
        with pytest.raises(
            ValueError, match="leaves"
        ):  # computes, with no parameters to compute from
            ask(to=None, **changes)
    assert len(said) == 6
    assert all("another model, tokenizer, data or setting" in line for line in said)


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "text"])
def test_a_damaged_cache_is_computed_again(tmp_path: Path, harm: str) -> None:
    model, params = samples.student()
    pairs = samples.pairs(4)
    cache = tmp_path / "log_probs.npz"
    said: list[str] = []

    def ask() -> list[np.ndarray]:
        return reference_log_probs(
            model, params, pairs, SETTINGS, cache=cache, fingerprints=NAMES, say=said.append
        )

    first = ask()
    content = bytearray(cache.read_bytes())
    at = content.index(np.concatenate(first).tobytes())
    content[at + 5] ^= 1
    damaged = {"cut": content[:-60], "bit": content, "empty": b"", "text": b"not an archive"}
    cache.write_bytes(bytes(damaged[harm]))
    second = ask()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(said) == 1
    assert said[0].startswith("log_probs.npz: reference log-probs are computed again: ")
    ask()
    assert len(said) == 1  # it was replaced
    assert [path.name for path in tmp_path.iterdir()] == ["log_probs.npz"]


def test_a_stop_is_heeded_between_passes() -> None:
    model, params = samples.student()
    with pytest.raises(Interrupted, match="stopped after 3 of 7 pairs"):
        pair_log_probs(model, params, samples.pairs(7), SETTINGS, stop_requested=lambda: True)


def test_what_a_stopped_pass_computed_is_kept(tmp_path: Path) -> None:
    model, params = samples.student()
    pairs = samples.pairs(7)
    whole = pair_log_probs(model, params, pairs, SETTINGS)
    cache = tmp_path / "log_probs.npz"
    seen: list[tuple[int, int]] = []
    said: list[str] = []

    def ask(stop: bool, pairs: Any = pairs) -> list[np.ndarray]:
        return reference_log_probs(
            model, params, pairs, SETTINGS, cache=cache, fingerprints=NAMES, say=said.append,
            progress=lambda *done: seen.append(done), stop_requested=lambda: stop,
        )  # fmt: skip

    with pytest.raises(Interrupted, match="stopped after 3 of 7 pairs"):
        ask(True)
    content = bytearray(cache.read_bytes())
    with np.load(cache) as file:
        kept, values = file["pairs"].tolist(), file["log_probs"]
    assert len(kept) == 3
    assert np.array_equal(values, np.concatenate([whole[place] for place in kept]))
    # Computed before: taken as it is, and no pass is made for it.
    with np.load(cache) as file:
        key = file["key"]
    np.savez(cache, key=key, pairs=kept, log_probs=values + 1)
    seen.clear()
    mixed = ask(False)
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)]
    for place, row in enumerate(mixed):
        assert np.array_equal(row, whole[place] + (1 if place in kept else 0))
    # Nothing is said: part of a pass is not a damaged file.
    assert said == []
    cache.write_bytes(bytes(content))
    again = ask(False)
    assert all(np.array_equal(a, b) for a, b in zip(again, whole, strict=True))
