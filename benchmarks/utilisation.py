"""Model FLOP utilisation of one device in SFT and DPO at the shapes of TinyLlama-1.1B.

    python -m benchmarks.utilisation [--only sft:none ...] [--micro-batch 4] [--steps 5] [--small]

The steps are those that `montessori sft` and `montessori dpo` run (`sft_step`, `dpo_step`, laid
out by `plan_steps`, AdamW, the state donated), on random weights and token ids, computed in
bfloat16 with float32 parameters. A variant is a kind of training and what its backward pass
recomputes (``sft:none``, ``dpo:full``, ...), in a process of its own, so that its peak memory is
its own; one that does not fit is reported as such, and the best of a kind counts.

- SFT: 256 samples a step, packed to rows of 2048 tokens. Instructions and responses have medians
  of 60 and 300 tokens (`montessori_jax.plan.work.Lengths`), log-normal with an assumed spread,
  cut at 2048.
- DPO: 32 pairs a step, a row each, the prompt computed once. Prompts have a median of 1000 tokens
  and a spread as narrow as the quickstart's, responses a median of 60.

What is counted, of real tokens alone: padding, recomputation and the optimizer add nothing.

- ``model_flop_utilisation`` is by the published formula (PaLM, arXiv 2204.02311, appendix B):
  ``6 N + 12 L H Q T`` a token, ``N`` the weights that a token is multiplied by (all but the
  input embedding), ``T`` the length of its own sample, not of the packed row.
- ``needed_flop_utilisation`` counts only what the loss needs: the head on response tokens,
  attention on the keys that a query sees.
- DPO's step is the policy's forward and backward pass over ``prompt | chosen | rejected``, the
  prompt once. The reference's forward pass is not in the step (its log-probs are computed before
  training), so it is neither timed nor counted.

Rates are medians over the timed steps, each waited for; the step before them is left out. The
peak is the device's published dense bfloat16 one (`montessori_jax.costs.PEAK_FLOPS`); on a device
that is not named there utilisation is null. Exit status 1: a kind stayed below 40%.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.record import RESULTS, ROOT, write_result
from montessori_jax.config import DpoConfig, SftConfig
from montessori_jax.costs import device_peak, peak_memory
from montessori_jax.data.chat import EncodedChat, fit
from montessori_jax.data.packing import bucket, count_targets, pack
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import UserError
from montessori_jax.models import Model, ModelConfig
from montessori_jax.models.attention_kernels import choose
from montessori_jax.pytrees import as_argument
from montessori_jax.training.batches import plan_steps, stack
from montessori_jax.training.loop import step_program
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.pairs import EncodedPair, fit_pair, pack_pairs
from montessori_jax.training.state import start
from montessori_jax.training.steps import dpo_step, sft_step

TINYLLAMA = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
)
TARGET = 0.40
KINDS = ("sft", "dpo")
VARIANTS = tuple(f"{kind}:{remat}" for kind in KINDS for remat in ("none", "dots", "full"))


@dataclass(frozen=True)
class Scale:
    """The model, and medians of lengths in tokens; ``samples`` and ``pairs`` are a step's."""

    model: ModelConfig
    samples: int
    pairs: int
    max_length: int
    instruction: int
    response: int
    prompt: int
    answer: int


FULL = Scale(TINYLLAMA, 256, 32, 2048, 60, 300, 1000, 60)
SMALL = Scale(
    replace(
        TINYLLAMA,
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    ),
    *(24, 6, 128, 4, 20, 50, 6),
)


class Counted(NamedTuple):
    """Of one step: its tokens, those that have a loss, and pairs of a query and a key.

    ``square`` counts every key of the query's own sample, ``seen`` those up to the query.
    """

    tokens: int
    targets: int
    square: int
    seen: int


def count_chats(chats: Sequence[EncodedChat]) -> Counted:
    """Of samples that do not see each other."""
    sizes = [len(chat.tokens) for chat in chats]
    return Counted(
        sum(sizes),
        sum(map(count_targets, chats)),
        sum(n * n for n in sizes),
        sum(map(_seen, sizes)),
    )


def count_pairs(pairs: Sequence[EncodedPair]) -> Counted:
    """Of rows ``prompt | chosen | rejected``: what two separate rows have, the prompt once."""
    tokens = targets = square = seen = 0
    for pair in pairs:
        prompt = pair.chosen.prompt_length
        chosen, rejected = len(pair.chosen.tokens), len(pair.rejected.tokens)
        tokens, targets = tokens + pair.length, targets + pair.targets
        square += chosen**2 + rejected**2 - prompt**2
        seen += _seen(chosen) + _seen(rejected) - _seen(prompt)
    return Counted(tokens, targets, square, seen)


def _seen(size: int) -> int:
    return size * (size + 1) // 2


def weights(config: ModelConfig) -> tuple[int, int]:
    """Weights of all layers' matrices, and of the head: what a token is multiplied by."""
    width, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    return config.num_layers * layer, width * config.vocab_size


def published_flops(config: ModelConfig, step: Counted) -> float:
    """``6 N`` a token and ``12 L H Q`` a query and key of one sample, forward and backward."""
    layers, head = weights(config)
    return 6.0 * (layers + head) * step.tokens + _attention(config) * step.square


def needed_flops(config: ModelConfig, step: Counted) -> float:
    """The same with the head on targets alone, and no key behind its query."""
    layers, head = weights(config)
    return 6.0 * (layers * step.tokens + head * step.targets) + _attention(config) * step.seen


def _attention(config: ModelConfig) -> float:
    return 12.0 * config.num_layers * config.num_heads * config.head_dim


def make_chats(scale: Scale, steps: int) -> list[EncodedChat]:
    """The samples of all steps, as long as instruction data are."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(steps * scale.samples):
        prompt = min(_length(random, scale.instruction, 0.6), scale.max_length // 2)
        chat = _chat(random, scale, _ids(random, scale, prompt), scale.response, 0.8)
        made.append(fit(chat, scale.max_length))
    return [chat for chat in made if chat is not None]


def make_pairs(scale: Scale, steps: int) -> list[EncodedPair]:
    """The pairs of all steps, as long as a teacher's prompts and answers are."""
    random = np.random.default_rng(1)
    made = []
    for index in range(steps * scale.pairs):
        size = min(_length(random, scale.prompt, 0.05), scale.max_length * 3 // 4)
        prompt = _ids(random, scale, size)
        both = [_chat(random, scale, prompt, scale.answer, 0.5) for _ in range(2)]
        made.append(fit_pair(EncodedPair(str(index), *both), scale.max_length))
    return [pair for pair in made if pair is not None]


def _length(random: np.random.Generator, median: int, spread: float) -> int:
    return max(2, round(random.lognormal(np.log(median), spread)))


def _ids(random: np.random.Generator, scale: Scale, size: int) -> np.ndarray:
    return random.integers(3, scale.model.vocab_size, size).astype(np.int32)


def _chat(
    random: np.random.Generator, scale: Scale, prompt: np.ndarray, median: int, spread: float
) -> EncodedChat:
    answer = _ids(random, scale, _length(random, median, spread))
    return EncodedChat(np.concatenate([prompt, answer]), len(prompt))


def step_members(count: int, steps: int) -> list[list[int]]:
    """The samples of each step, in order."""
    each = count // steps
    return [list(range(step * each, (step + 1) * each)) for step in range(steps)]


def batches_of(
    kind: str, scale: Scale, micro_batch: int, steps: int
) -> tuple[list[Any], list[Counted]]:
    """Host batches of one shape, laid out as training lays them out, and what each holds."""
    if kind == "sft":
        chats = make_chats(scale, steps)
        members = step_members(len(chats), steps)
        plans = plan_steps(
            members,
            [len(chat.tokens) for chat in chats],
            [count_targets(chat) for chat in chats],
            micro_batch,
            share_rows=True,
        )
        if plans[0].shape.row_length != bucket(scale.max_length):
            raise ValueError(f"rows of {plans[0].shape.row_length}, not {scale.max_length}")
        batches = [
            stack(plan, lambda rows, shape: pack(
                chats, rows, row_length=shape.row_length, slots=shape.slots, rows=shape.rows
            ))
            for plan in plans
        ]  # fmt: skip
        return batches, [count_chats([chats[i] for i in step]) for step in members]
    pairs = make_pairs(scale, steps)
    members = step_members(len(pairs), steps)
    plans = plan_steps(
        members,
        [pair.length for pair in pairs],
        [pair.targets for pair in pairs],
        micro_batch,
        share_rows=False,
    )
    # -10 a token is near what random weights have.
    batches = [
        stack(plan, lambda rows, shape: pack_pairs(
            [pairs[i] for [i] in rows],
            [np.full(pairs[i].targets, -10.0, np.float32) for [i] in rows],
            row_length=shape.row_length, slots=shape.slots, rows=shape.rows,
        ))
        for plan in plans
    ]  # fmt: skip
    return batches, [count_pairs([pairs[i] for i in step]) for step in members]


def run_variant(name: str, scale: Scale, micro_batch: int, steps: int) -> dict[str, Any]:
    """Compile and time one variant in this process.

    Raises:
        UserError: it does not fit in the device's memory.
    """
    kind, _, remat = name.partition(":")
    common: dict[str, Any] = {
        "dtype": "bfloat16",
        "remat": remat,
        "micro_batch": micro_batch,
        "max_length": scale.max_length,
    }
    model = Model(scale.model)
    batches, counted = batches_of(kind, scale, micro_batch, steps + 1)
    settings: Any
    if kind == "sft":
        settings = SftConfig(batch_size=scale.samples, **common)
        tx = make_optimizer(settings, len(batches))
        step = sft_step(model, tx, settings)
    else:
        settings = DpoConfig(batch_size=scale.pairs, **common)
        tx = make_optimizer(settings, len(batches))
        step = dpo_step(model, tx, settings)
    advice = f"lower --micro-batch (now {micro_batch}), recompute more (now {remat})"
    with fits_in_memory(name, advice):
        params = jax.jit(model.init)(jax.random.key(0))
        state = jax.block_until_ready(start(params, tx))
        del params
        argument = as_argument(step)
        began = time.perf_counter()
        program = step_program(None, None).lower(argument, state, batches[0]).compile()
        compiled = time.perf_counter() - began
        seconds, losses = [], []
        for batch in batches:
            there = jax.block_until_ready(jax.device_put(batch))
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(program(argument, state, there))
            seconds.append(time.perf_counter() - began)
            losses.append(float(metrics["loss"]))
    if not np.isfinite(losses).all():
        raise ValueError(f"{name}: losses are {losses}")
    rows = batches[0].tokens if kind == "sft" else batches[0].batch.tokens
    shape = (*rows.shape[1:], scale.model.num_heads, scale.model.head_dim)
    query: Any = jax.ShapeDtypeStruct(shape, settings.dtype)
    return {
        **rates(scale.model, counted[1:], seconds[1:]),
        "compile_seconds": round(compiled, 2),
        "peak_memory_gib": round(peak_memory() / 2**30, 3),
        "peak_memory_of": "device" if jax.local_devices()[0].memory_stats() else "process",
        "attention": choose("auto", query, branches=kind == "dpo", soft_cap=None),
        "micro_batches": list(rows.shape),
        "filled": round(float(np.mean([one.tokens for one in counted])) / rows.size, 4),
        "losses": losses,
    }


def rates(
    config: ModelConfig, counted: Sequence[Counted], seconds: Sequence[float]
) -> dict[str, Any]:
    """Medians over timed steps; utilisation is null where the device's peak is not known."""
    peak = device_peak()
    one = None if peak is None else peak / jax.device_count()  # the step runs on one of them

    def median(values: Sequence[float]) -> float:
        pairs = zip(values, seconds, strict=True)
        return float(np.median([value / took for value, took in pairs]))

    published = median([published_flops(config, step) for step in counted])
    needed = median([needed_flops(config, step) for step in counted])
    return {
        "model_flop_utilisation": None if one is None else round(published / one, 4),
        "needed_flop_utilisation": None if one is None else round(needed / one, 4),
        "model_tflops_per_second": round(published / 1e12, 6),
        "peak_tflops_per_second": None if one is None else one / 1e12,
        "tokens_per_second": round(median([step.tokens for step in counted]), 1),
        "tokens_per_step": int(np.median([step.tokens for step in counted])),
        "seconds_per_step": [round(took, 4) for took in seconds],
        "device": jax.devices()[0].device_kind,
    }


def reached(variants: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    """Of each kind that ran, whether its best variant is at the target; null: peak not known."""
    found: dict[str, bool | None] = {}
    for kind in KINDS:
        mine = [one for name, one in variants.items() if name.startswith(kind)]
        ran = [one["model_flop_utilisation"] for one in mine if "failed" not in one]
        if mine:
            found[kind] = None if None in ran else max(ran, default=0.0) >= TARGET
    return found


def child(name: str, parsed: argparse.Namespace) -> dict[str, Any]:
    """Run one variant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.utilisation", "--variant", name]
    command += ["--micro-batch", str(parsed.micro_batch), "--steps", str(parsed.steps)]
    done = subprocess.run(
        [*command, *["--small"] * parsed.small],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return {"failed": f"ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the variants, write ``utilisation.json``; 1 where a kind stayed below the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows on the device at one time")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after a first")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.variant:
        # Else a second run would report how long a program takes to read.
        jax.config.update("jax_enable_compilation_cache", False)
        scale = SMALL if parsed.small else FULL
        try:
            found = run_variant(parsed.variant, scale, parsed.micro_batch, parsed.steps)
        except UserError as error:
            found = {"failed": str(error)}
        print(json.dumps(found))
        return 0
    variants: dict[str, dict[str, Any]] = {}
    for name in parsed.only:
        variants[name] = child(name, parsed)
        print(f"{name:9}", json.dumps(variants[name]), flush=True)
    result = {
        "model": "tiny shapes" if parsed.small else "the shapes of TinyLlama-1.1B, random weights",
        "target": TARGET,
        "reached": reached(variants),
        "micro_batch": parsed.micro_batch,
        "variants": variants,
    }
    name = "utilisation-small" if parsed.small else "utilisation"
    print(write_result(name, result, folder=parsed.out))
    return int(False in result["reached"].values())


if __name__ == "__main__":
    sys.exit(main())
