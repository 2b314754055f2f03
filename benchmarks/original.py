"""The public code's way to measure influence, written in PyTorch for the benchmark.

For every candidate: model and optimizer state read from disk, one AdamW step on the candidate's row
padded to 1,024 tokens, then the loss over the whole reference, rows padded alike, in batches of 8
(github.com/cxcscmu/Montessori-Instruct, its student's probe script; here in float32).
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from montessori_jax.costs import peak_memory
from montessori_jax.data.chat import EncodedChat
from montessori_jax.models import ModelConfig
from montessori_jax.models.families import to_hf_config
from montessori_jax.models.weights import from_params

PADDED, BATCH = 1024, 8


def original(
    folder: Path,
    config: ModelConfig,
    params: Any,
    opt_state: Any,
    learning_rate: float,
    candidates: list[EncodedChat],
    references: list[EncodedChat],
    max_grad_norm: float = 0.0,
) -> dict[str, Any]:
    """Seconds a candidate at the better of 1 and 2 threads, and what was found.

    Gradients are clipped to ``max_grad_norm`` where the student's optimizer clips them; 0: not.
    """

    def tensors(tree: Any) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v.copy()) for k, v in from_params(config, tree)}

    if config.family != "llama":
        raise SystemExit(f"the original procedure is written for Llama here, not {config.family}")
    model = LlamaForCausalLM(LlamaConfig(**to_hf_config(config)))
    loaded = model.load_state_dict(tensors(params), strict=False)
    if loaded.unexpected_keys or set(loaded.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"the student does not fit transformers' Llama: {loaded}")
    adam = next(
        leaf
        for leaf in jax.tree.leaves(opt_state, is_leaf=is_adam)
        if isinstance(leaf, optax.ScaleByAdamState)
    )
    first, second = tensors(adam.mu), tensors(adam.nu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for name, weight in model.named_parameters():
        step = torch.tensor(float(adam.count))
        optimizer.state[weight] = {"step": step, "exp_avg": first[name]}
        optimizer.state[weight]["exp_avg_sq"] = second[name]
    checkpoint = folder / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    batches = [
        padded(references[start : start + BATCH]) for start in range(0, len(references), BATCH)
    ]

    def reference_loss() -> float:
        with torch.no_grad():
            return float(np.mean([float(model(**batch).loss) for batch in batches]))

    def loss_after(chat: EncodedChat) -> float:
        stored = torch.load(checkpoint)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        optimizer.zero_grad()
        model(**padded([chat])).loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        return reference_loss()

    trial = padded(references[:1])
    speeds = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            model(**trial)
            start = time.perf_counter()
            model(**trial)
            speeds[threads] = time.perf_counter() - start
    threads = min(speeds, key=lambda key: speeds[key])
    torch.set_num_threads(threads)
    before = reference_loss()
    seconds, found = [], []
    for chat in candidates:
        start = time.perf_counter()
        found.append(before - loss_after(chat))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds_per_candidate": round(float(np.mean(seconds)), 3),
        "runs": [round(one, 2) for one in seconds],
        "threads": threads,
        "flops_per_candidate": flops(model, len(references)),
        "peak_gflops": round(peak_rate(), 1),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "influence": found,
    }


def flops(model: Any, references: int) -> float:
    """Of one candidate: a gradient on 1,024 tokens and a forward pass of every reference row."""
    return sum(weight.numel() for weight in model.parameters()) * PADDED * (6.0 + 2 * references)


def peak_rate(size: int = 2048) -> float:
    """GFLOP/s of a float32 matrix product at the threads in use: the best of five."""
    left, right = torch.ones(size, size), torch.ones(size, size)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def padded(chats: list[EncodedChat]) -> dict[str, torch.Tensor]:
    """Rows of 1,024 tokens, labels on the responses only."""
    ids = torch.zeros((len(chats), PADDED), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, chat in enumerate(chats):
        size = len(chat.tokens)
        ids[row, :size] = torch.from_numpy(chat.tokens.astype(np.int64))
        mask[row, :size] = 1
        labels[row, chat.prompt_length : size] = ids[row, chat.prompt_length : size]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def is_adam(node: Any) -> bool:
    """Whether a part of an optimizer's state holds Adam's moments."""
    return hasattr(node, "mu")
