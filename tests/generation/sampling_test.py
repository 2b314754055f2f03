"""Penalties and cuts against transformers and plain definitions, draws against their law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from montessori_jax.config import SamplingConfig
from montessori_jax.generation.sampling import (
    TokenCounts,
    count_tokens,
    draw,
    keep_top_k,
    keep_top_p,
    penalise,
    sample_keys,
    start_counts,
)

SPREADS = [0.01, 1.0, 4.0, 30.0]


def random_logits(rows: int, vocab: int, spread: float, seed: int = 0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).normal(size=(rows, vocab))).astype(np.float32)


def keys(count: int, seed: int = 0) -> jax.Array:
    return sample_keys(jnp.uint32(seed), jnp.arange(count, dtype=jnp.uint32), 1)


def by_vllm_definition(
    logits: np.ndarray, prompt: list[int], output: list[int], settings: SamplingConfig
) -> np.ndarray:
    """One row in float64, a token at a time, as vllm/model_executor/layers/utils.py defines it."""
    result = logits.astype(np.float64)
    for token in range(len(logits)):
        if token in prompt or token in output:
            if result[token] > 0:
                result[token] /= settings.repetition_penalty
            else:
                result[token] *= settings.repetition_penalty
        result[token] -= settings.frequency_penalty * output.count(token)
        result[token] -= settings.presence_penalty * (token in output)
    return result


def counts_after(
    settings: SamplingConfig, prompts: list[list[int]], outputs: list[list[int]], vocab: int
) -> TokenCounts:
    """Counts of rows with these prompts (of one sample each) and outputs of equal lengths."""
    longest = max(map(len, prompts)) + 3
    padded = np.array([row + [vocab - 1] * (longest - len(row)) for row in prompts], np.int32)
    lengths = np.array([len(row) for row in prompts], np.int32)
    counts = start_counts(settings, padded, lengths, 1, vocab)
    for tokens in np.array(outputs, np.int32).T:
        counts = count_tokens(counts, jnp.asarray(tokens))
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_penalties_are_vllms(seed: int):
    rng = np.random.default_rng(seed)
    rows, vocab = 5, 23
    settings = SamplingConfig(
        repetition_penalty=float(rng.choice([0.7, 1.0, 1.3, 2.0])),
        frequency_penalty=float(rng.choice([-1.5, 0.0, 0.4])),
        presence_penalty=float(rng.choice([-0.5, 0.0, 1.0, 2.0])),
    )
    logits = random_logits(rows, vocab, 3.0, seed)
    logits[:, 3] = 0.0
    # Token vocab - 1 pads prompts and must not count as theirs.
    prompts = [rng.integers(0, vocab - 1, rng.integers(1, 12)).tolist() for _ in range(rows)]
    outputs = rng.integers(0, vocab - 1, (rows, 9)).tolist()
    counts = counts_after(settings, prompts, outputs, vocab)
    found = penalise(jnp.asarray(logits), counts, settings)
    for row in range(rows):
        expected = by_vllm_definition(logits[row], prompts[row], outputs[row], settings)
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-6)


def test_penalties_by_hand():
    settings = SamplingConfig(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=1.0)
    counts = counts_after(settings, [[0, 1]], [[1, 2, 2]], 5)
    found = penalise(jnp.asarray([[4.0, -4.0, 6.0, 1.0, -1.0]]), counts, settings)
    # Prompt only: halved. Written once, negative: doubled, then -0.5 - 1. Twice: halved, -1 - 1.
    np.testing.assert_allclose(found, [[2.0, -9.5, 1.0, 1.0, -1.0]])


def test_repetition_penalty_is_transformers():
    logits = random_logits(4, 50, 5.0)
    seen = np.random.default_rng(1).integers(0, 50, (4, 12))
    settings = SamplingConfig(repetition_penalty=1.7)
    counts = counts_after(settings, seen[:, :7].tolist(), seen[:, 7:].tolist(), 50)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(seen), torch.tensor(logits))
    np.testing.assert_allclose(penalise(jnp.asarray(logits), counts, settings), expected, rtol=1e-6)


def test_counts_take_memory_only_where_a_penalty_needs_them():
    tokens, lengths = np.zeros((2, 4), np.int32), np.full(2, 4, np.int32)

    def started(**penalties: float) -> TokenCounts:
        return start_counts(SamplingConfig(**penalties), tokens, lengths, 3, 11)

    assert started() == TokenCounts(None, None)
    assert started(repetition_penalty=1.1).generated is None
    assert started(repetition_penalty=1.1).seen.shape == (6, 11)
    for name in ("presence_penalty", "frequency_penalty"):
        assert started(**{name: 0.5}).seen is None
        assert started(**{name: 0.5}).generated.shape == (6, 11)


def test_samples_of_a_prompt_have_counts_of_their_own():
    settings = SamplingConfig(repetition_penalty=1.5, presence_penalty=1.0)
    tokens = np.array([[1, 2], [3, 3]], np.int32)
    counts = start_counts(settings, tokens, np.array([2, 1], np.int32), 2, 6)
    counts = count_tokens(counts, jnp.asarray([0, 1, 4, 4], jnp.int32))
    assert [set(np.nonzero(row)[0]) for row in np.asarray(counts.seen)] == [
        {0, 1, 2}, {1, 2}, {3, 4}, {3, 4}
    ]  # fmt: skip
    assert np.asarray(counts.generated).nonzero()[1].tolist() == [0, 1, 4, 4]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("k", [1, 2, 17, 499, 500, 600])
def test_top_k_is_transformers(k: int, spread: float):
    logits = random_logits(6, 500, spread)
    logits[2] = np.round(logits[2])  # many ties
    logits[3] = 0.25
    logits[4, ::2] = -np.inf
    logits[5, :250], logits[5, 250:] = 0.0, -0.0
    expected = TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy()
    assert np.array_equal(keep_top_k(jnp.asarray(logits), k), expected)


def test_top_k_tells_apart_what_probabilities_do_not():
    """Logits one rounding step apart, whose probabilities are equal in float32."""
    logits = np.full((1, 8), -30.0, np.float32)
    logits[0, 5], logits[0, 6] = 0.0, np.nextafter(np.float32(-30), np.float32(0))
    kept = np.isfinite(np.asarray(keep_top_k(jnp.asarray(logits), 2)))
    assert np.nonzero(kept[0])[0].tolist() == [5, 6]


def nucleus(logits: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    """In float64: what stays, and which tokens lie too near the cut to tell in float32."""
    mass = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    share = mass / mass.sum(axis=-1, keepdims=True)
    likelier = np.array(
        [[row[row > one].sum() for one in row] for row in share]
    )  # fmt: skip
    return likelier < p, np.abs(likelier - p) < 1e-5


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 0.999999])
def test_top_p_is_its_definition(p: float, spread: float):
    logits = random_logits(24, 300, spread, seed=2)
    logits[1] = np.round(2 * logits[1]) / 2  # ties at the cut: all stay
    logits[2] = -3.0  # one tie
    logits[3, 50:] = -np.inf  # what top-k leaves
    kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), p)))
    expected, unclear = nucleus(logits, p)
    if p == 0.999999:
        unclear |= np.abs(p - 1) < 1e-5  # the last millionth is float32's own rounding
    assert np.all((kept == (expected & np.isfinite(logits))) | unclear)
    assert kept.any(axis=-1).all()


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("k", [0, 40])
def test_warping_is_transformers(p: float, spread: float, k: int):
    """Temperature, top-k, top-p in this order, on a vocabulary of real size."""
    logits = random_logits(8, 32_000, spread, seed=3)
    warped = TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
    if k:
        warped = TopKLogitsWarper(k)(None, warped)
    expected = TopPLogitsWarper(p)(None, warped).numpy()
    scaled = jnp.asarray(logits) / jnp.float32(0.7)
    found = np.asarray(keep_top_p(keep_top_k(scaled, k), p))
    differ = np.isfinite(found) != np.isfinite(expected)
    # transformers adds up 32,000 numbers one by one in float32.
    assert differ.sum(axis=-1).max() <= (0 if k else 3)
    same = np.isfinite(found) & np.isfinite(expected)
    np.testing.assert_allclose(found[same], expected[same], rtol=1e-6)


def test_cuts_that_keep_all_change_nothing():
    logits = jnp.asarray(random_logits(2, 30, 3.0))
    for same in (keep_top_k(logits, 0), keep_top_k(logits, 30), keep_top_p(logits, 1.0)):
        assert same is logits


def test_greedy_is_the_first_of_the_largest():
    logits = jnp.asarray([[0.0, 2.0, 2.0, 1.0], [3.0, -1.0, 3.0, 0.0]])
    tokens = draw(logits, keys(2), SamplingConfig(temperature=0.0, top_p=0.5, top_k=3))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("vocab", [5, 256, 700])
@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        (SamplingConfig(), None),
        (SamplingConfig(temperature=0.5), None),
        (SamplingConfig(temperature=1.7, top_p=0.8), "p"),
        (SamplingConfig(top_k=3), "k"),
    ],
)
def test_draws_follow_their_distribution(vocab: int, settings: SamplingConfig, cut: str | None):
    """Chi-squared over 40,000 draws, tokens expected fewer than 5 times put together."""
    draws, rows = 40_000, 1_000
    row = random_logits(1, vocab, 2.0, seed=vocab)[0].astype(np.float64) / settings.temperature
    if cut == "p":
        row[~nucleus(row[None], settings.top_p)[0][0]] = -np.inf
    elif cut == "k":
        row[row < np.sort(row)[-3]] = -np.inf
    law = np.exp(row - row.max())
    law /= law.sum()
    logits = jnp.asarray(np.tile(random_logits(1, vocab, 2.0, seed=vocab), (rows, 1)), jnp.float32)
    some = jax.jit(lambda keys: draw(logits, keys, settings))
    drawn = np.concatenate([some(keys(rows, seed)) for seed in range(draws // rows)])
    seen = np.bincount(drawn, minlength=vocab)
    assert seen[law == 0].sum() == 0
    often = law * draws >= 5
    observed, expected = list(seen[often]), list(law[often] * draws)
    if law[~often].sum() > 0:
        observed.append(seen[~often].sum())
        expected.append(law[~often].sum() * draws)
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_impossible_tokens_are_never_drawn():
    """One likely token at the end of a vocabulary that fills no block."""
    logits = np.full((64, 517), -np.inf, np.float32)
    logits[:, 516] = -1e4
    assert set(draw(jnp.asarray(logits), keys(64), SamplingConfig()).tolist()) == {516}


def test_tiny_temperature_is_greedy():
    logits = random_logits(16, 1000, 5.0)
    drawn = draw(jnp.asarray(logits), keys(16), SamplingConfig(temperature=1e-30))
    assert np.array_equal(drawn, logits.argmax(axis=-1))


def test_a_rows_draw_depends_on_its_logits_and_key_alone():
    logits, settings = random_logits(12, 400, 1.0), SamplingConfig(top_p=0.95, top_k=100)
    some = jax.jit(lambda logits, keys: draw(logits, keys, settings))
    together = np.asarray(some(logits, keys(12)))
    order = np.random.default_rng(0).permutation(12)
    assert np.array_equal(some(logits[order], keys(12)[order]), together[order])
    assert np.array_equal(some(logits[3:4], keys(12)[3:4]), together[3:4])
    assert len(set(np.asarray(some(np.tile(logits[:1], (12, 1)), keys(12))).tolist())) > 3


def test_keys_are_of_seed_row_and_sample_alone():
    def words(seed: int, rows: list[int], samples: int) -> np.ndarray:
        made = sample_keys(jnp.uint32(seed), jnp.asarray(rows, jnp.uint32), samples)
        return np.asarray(jax.random.key_data(made)).reshape(len(rows), samples, -1)

    base = words(5, [3, 8], 4)
    assert np.array_equal(words(5, [8, 1, 3], 2)[2], base[0, :2])
    assert not np.array_equal(words(6, [3], 1)[0, 0], base[0, 0])
    assert len({tuple(key) for key in base.reshape(-1, 2)}) == 8
    # By hand: three folds of the seed's key.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5, impl="threefry2x32"), 8), 3)
    assert np.array_equal(jax.random.key_data(key), base[1, 3])
