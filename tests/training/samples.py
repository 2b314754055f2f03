"""Small models, chats and pairs for the training tests; transformers' twin of the same model."""

from functools import cache
from typing import Any

import jax
import numpy as np
import torch
from transformers import LlamaForCausalLM, get_wsd_schedule

from montessori_jax.config import OptimizerConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.models import Model, ModelConfig, Params
from montessori_jax.models.families import family_of
from montessori_jax.models.weights import to_params
from montessori_jax.training.pairs import EncodedPair
from montessori_jax.training.schedules import phases
from tests.models import tiny

CONFIG = {**tiny.CONFIG, "num_hidden_layers": 2}
VOCABULARY = CONFIG["vocab_size"]


def twins(seed: int = 0) -> tuple[Model, Params, LlamaForCausalLM]:
    """Our model, its parameters, and transformers' model with the same weights."""
    theirs = tiny.torch_model(CONFIG, seed)
    config = family_of(CONFIG, "test")
    return Model(config), to_params(config, tiny.state(theirs)), theirs


@cache
def student(seed: int = 0) -> tuple[Model, Params]:
    """Our side of `twins`, initialised as a model is before pre-training."""
    model = Model(family_of(CONFIG, "test"))
    return model, model.init(jax.random.key(seed))


def larger_config() -> ModelConfig:
    """One more layer than `student`."""
    return family_of({**CONFIG, "num_hidden_layers": 3}, "test")


def chats(count: int, seed: int = 0, longest: int = 24) -> list[EncodedChat]:
    """Random token ids; prompts and responses of unequal lengths, at least one token each."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(random.integers(4, longest + 1))
        tokens = random.integers(3, VOCABULARY, size).astype(np.int32)
        made.append(EncodedChat(tokens, int(random.integers(1, size))))
    return made


def pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    """Random prompts of 2 to 15 tokens with two random responses of 1 to 8."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return random.integers(3, VOCABULARY, int(random.integers(low, high))).astype(np.int32)

    made = []
    for index in range(count):
        prompt = ids(2, 16)
        chosen, rejected = (np.concatenate([prompt, ids(1, 9)]) for _ in range(2))
        made.append(
            EncodedPair(
                f"pair{index}",
                EncodedChat(chosen, len(prompt)),
                EncodedChat(rejected, len(prompt)),
            )
        )
    return made


def equal(first: Any, second: Any) -> bool:
    """Same structure, dtypes and bits."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and np.array(a).tobytes() == np.array(b).tobytes()
        for a, b in leaves
    )


def largest_difference(first: Any, second: Any) -> float:
    """Over all leaves of two trees of one structure."""
    gaps = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()),
        first,
        second,
    )
    return max(jax.tree.leaves(gaps))


def torch_log_probs(model: LlamaForCausalLM, chat: EncodedChat) -> torch.Tensor:
    """Transformers' log-prob of each response token, the chat alone in its row."""
    ids = torch.tensor(chat.tokens, dtype=torch.long)[None]
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    every = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return every[chat.prompt_length - 1 :]


def torch_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimizerConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Transformers' schedule with the phases and the final rate of ``settings``."""
    split = phases(settings, steps)
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=split.warmup,
        num_stable_steps=split.stable,
        num_decay_steps=split.decay,
        decay_type=settings.decay,
        min_lr_ratio=settings.final_learning_rate / settings.learning_rate,
    )
