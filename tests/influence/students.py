"""A tiny student in mid-training, and text-like data that it can learn from."""

from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import optax

from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import Batch, pack
from montessori_jax.influence import MeanLoss, TokenLosses
from montessori_jax.models import Model, ModelConfig

VOCABULARY = 61
CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.1,
)
MODEL = Model(CONFIG)
RATE = 1e-3


class Student(NamedTuple):
    """Parameters and Adam's state after a few steps."""

    params: dict
    opt_state: optax.OptState
    tx: optax.GradientTransformation


def chats(count: int, seed: int, shortest: int = 8, longest: int = 40) -> list[EncodedChat]:
    """Counting sequences modulo the vocabulary, each with a stride and some noise."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(shortest, longest + 1))
        tokens = (rng.integers(VOCABULARY) + rng.integers(1, 4) * np.arange(length)) % VOCABULARY
        noisy = rng.random(length) < rng.uniform(0, 0.6)
        tokens = np.where(noisy, rng.integers(VOCABULARY, size=length), tokens)
        prompt = int(rng.integers(2, length // 2 + 1))
        made.append(EncodedChat(tokens.astype(np.int32), prompt))
    return made


def student(rate: float = RATE) -> Student:
    """The warmed-up model, to be probed at ``rate``."""
    params, state = warmed_up()
    return Student(params, state, adamw(rate))


@cache
def warmed_up() -> tuple[dict, optax.OptState]:
    """The tiny model after 30 steps of 8 samples at learning rate 3e-3, and Adam's state."""
    tx = adamw(3e-3)
    params = MODEL.init(jax.random.key(0))
    state = tx.init(params)
    loss = MeanLoss(TokenLosses(MODEL))

    @jax.jit
    def step(params: dict, state: optax.OptState, batch: Batch) -> tuple[dict, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

    for number in range(30):
        batch = pack(chats(8, 1000 + number), [[i] for i in range(8)], row_length=48, slots=48)
        params, state = step(params, state, batch)
    return params, state


@cache
def adamw(rate: float) -> optax.GradientTransformation:
    """One object for one rate, as programs are cached by it; no weight decay."""
    return optax.adamw(rate, weight_decay=0.0)
