"""`exact` against PyTorch doing what the definition says: restore, step, measure, restore."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from montessori_jax.influence import (
    MeanLoss,
    TokenLosses,
    chat_candidate,
    chat_reference,
    local_influence,
)
from tests.influence.students import CONFIG, MODEL, chats
from tests.models.tiny import MATRICES

RATE, DECAY = 1e-3, 0.01
REFERENCES = chats(6, 21)
CANDIDATES = chats(8, 22)


class Norm(torch.nn.RMSNorm):
    """Torch's own norm: the one of transformers works in float32 whatever the model's dtype."""


def to_torch(tree) -> dict[str, torch.Tensor]:
    """A parameter-shaped tree of ours as a Hugging Face state dict."""

    def tensor(leaf, transpose=False):
        values = np.array(leaf)
        return torch.from_numpy(values.T.copy() if transpose else values)

    layers = tree["layers"]
    state = {
        "model.embed_tokens.weight": tensor(tree["embed"]["embedding"]),
        "model.norm.weight": tensor(tree["norm"]["scale"]),
        "lm_head.weight": tensor(tree["head"]["kernel"], True),
    }
    for i in range(CONFIG.num_layers):
        head = f"model.layers.{i}."
        for theirs, (part, ours) in MATRICES.items():
            state[f"{head}{theirs}.weight"] = tensor(layers[part][ours]["kernel"][i], True)
        state[f"{head}input_layernorm.weight"] = tensor(layers["attention_norm"]["scale"][i])
        state[f"{head}post_attention_layernorm.weight"] = tensor(layers["mlp_norm"]["scale"][i])
    return state


def torch_model(params, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=CONFIG.vocab_size,
                hidden_size=CONFIG.hidden_size,
                intermediate_size=CONFIG.intermediate_size,
                num_hidden_layers=CONFIG.num_layers,
                num_attention_heads=CONFIG.num_heads,
                num_key_value_heads=CONFIG.num_kv_heads,
                head_dim=CONFIG.head_dim,
                max_position_embeddings=CONFIG.max_position_embeddings,
                rms_norm_eps=CONFIG.rms_norm_eps,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
            )
        ).to(dtype)
        norms = [name for name, _ in model.named_modules() if name.endswith("norm")]
        for name in norms:
            parent, _, last = name.rpartition(".")
            norm = Norm(CONFIG.hidden_size, eps=CONFIG.rms_norm_eps)
            setattr(model.get_submodule(parent), last, norm)
    finally:
        torch.set_default_dtype(torch.float32)
    model.load_state_dict(to_torch(params))
    return model.eval()


def mean_loss(model, chat) -> torch.Tensor:
    tokens = torch.from_numpy(chat.tokens.astype(np.int64))[None]
    logits = model(tokens).logits[0, chat.prompt_length - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, tokens[0, chat.prompt_length :])


def reference_loss(model) -> float:
    with torch.no_grad():
        return float(np.mean([float(mean_loss(model, chat)) for chat in REFERENCES]))


def torch_influence(params, first, second, count, dtype) -> list[float]:
    """The public procedure: state restored for each candidate, one step, the reference again."""
    model = torch_model(params, dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY
    )
    first, second = to_torch(first), to_torch(second)
    for name, weight in model.named_parameters():
        optimizer.state[weight] = {
            "step": torch.tensor(float(count)),
            "exp_avg": first[name].to(dtype),
            "exp_avg_sq": second[name].to(dtype),
        }
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    before = reference_loss(model)
    found = []
    for chat in CANDIDATES:
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        optimizer.zero_grad()
        mean_loss(model, chat).backward()
        optimizer.step()
        found.append(before - reference_loss(model))
    return found


def both(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), MODEL.init(jax.random.key(3)))
    first = jax.tree.map(lambda leaf: (1e-3 * rng.normal(size=leaf.shape)).astype(dtype), params)
    second = jax.tree.map(
        lambda leaf: (1e-5 * rng.uniform(0.1, 2, leaf.shape)).astype(dtype), params
    )
    tx = optax.adamw(RATE, weight_decay=DECAY)
    params, first, second = (jax.tree.map(jnp.asarray, one) for one in (params, first, second))
    state = tx.init(params)
    adam = state[0]._replace(count=jnp.int32(12), mu=first, nu=second)
    scores = local_influence(
        MeanLoss(TokenLosses(MODEL, dtype)),
        params,
        (adam, *state[1:]),
        tx,
        [chat_candidate(str(i), chat, 64) for i, chat in enumerate(CANDIDATES)],
        chat_reference(MODEL, REFERENCES, row_length=64, rows_per_pass=2, dtype=dtype),
        chunk=8,
        offset=False,
    )
    ours = np.array([score.influence for score in scores])
    return ours, np.array(torch_influence(params, first, second, 12, getattr(torch, dtype)))


def test_float64_within_a_millionth():
    with jax.enable_x64(True):
        ours, theirs = both("float64")
    assert len(ours) == 8
    assert np.ptp(theirs) > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_float32_correlates():
    ours, theirs = both("float32")
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9999
