"""Every estimator against exact influence in float64, on a small model: ranks, pairs, errors.

    python -m benchmarks.fidelity --rows alpaca.jsonl [--folder runs/fidelity] [--regimes NAMES]

A Llama-like decoder of half a million parameters learns from instruction rows (their words are
its tokens) for 60 steps of 32 while the rate ramps up; then 96 candidates are probed against 48
reference rows, the last of the file. Candidates come in pairs under one prompt: a row, and the
same row with a part of its response's words replaced at random. Pairs are compared by the paper's
rule (one above zero, one below) and, as momentum can put all on one side, relative to the
zero-gradient step.

A regime is an optimizer and a rate; ``original`` is that of Montessori-Instruct's public code
(gradients over 8, batches of 8). Each estimator and precision in a regime is a row, written down
when it is done; the same command goes on from there. The table is printed at the end and written
to ``benchmarks/results/fidelity.json``.
"""

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.fidelity_summary import compare, table
from benchmarks.record import write_result
from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import pack
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.influence import (
    METHODS,
    Candidate,
    MeanLoss,
    Probe,
    TokenLosses,
    chat_reference,
)
from montessori_jax.models import Model, ModelConfig
from montessori_jax.runs import Journal

LENGTH, SHORTEST = 128, 24
WORDS = 1500
WARMUP_STEPS, WARMUP_BATCH, WARMUP_RATE = 60, 32, 1e-3
CLIP = 1.0
SEED = 7


@dataclass(frozen=True)
class Regime:
    """How the probe step is made."""

    name: str
    optimizer: str
    rate: float
    scale: float = 1.0
    reduction: str = "sample"
    clip: bool = False


REGIMES = (
    Regime("adamw-1e-4", "adamw", 1e-4),
    Regime("adamw-5e-6", "adamw", 5e-6),
    Regime("original-5e-6", "adamw", 5e-6, scale=1 / 8, reduction="batch8"),
    Regime("original-1e-4", "adamw", 1e-4, scale=1 / 8, reduction="batch8"),
    Regime("adamw-clip-1e-4", "adamw", 1e-4, clip=True),
    Regime("sgd-1e-2", "sgd", 1e-2),
)
F64, F32, BF16, PURE = "float64", "float32", "bfloat16", "pure bfloat16"
# name, method, precision, options
ROWS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("first_order", "first_order", F64, {}),
    ("first_order, mean update", "first_order", F64, {"expansion_point": "mean_update"}),
    ("first_order, params", "first_order", F64, {"expansion_point": "params"}),
    ("control_variate, 6 of 48", "control_variate", F64, {}),
    ("linearized, secant", "linearized", F64, {}),
    ("linearized, secant, mean update", "linearized", F64, {"expansion_point": "mean_update"}),
    ("linearized, tangent", "linearized", F64, {"sensitivity": "tangent"}),
    ("grad_dot", "grad_dot", F64, {}),
    ("grad_cos", "grad_cos", F64, {}),
    ("less, published", "less", F64, {}),
    ("less, mended", "less", F64, {"form": "mended"}),
    ("exact", "exact", F32, {}),
    ("first_order", "first_order", F32, {}),
    ("linearized, secant", "linearized", F32, {}),
    ("exact", "exact", BF16, {}),
    ("first_order", "first_order", BF16, {}),
    ("linearized, secant", "linearized", BF16, {}),
    ("exact", "exact", PURE, {}),
    ("second_order", "second_order", F64, {}),
)


@dataclass(frozen=True)
class Data:
    """Encoded rows for each use."""

    warmup: list[EncodedChat]
    candidates: list[EncodedChat]
    prompts: list[int]
    references: list[EncodedChat]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]|\n", text.lower())


def encoded(rows: Sequence[Row]) -> list[EncodedChat]:
    """Rows cut at `LENGTH` words as chats over the commonest `WORDS` words; very short ones out."""
    counts = Counter(word for row in rows for word in words(text_of(row)))
    known = {word: i + 3 for i, (word, _) in enumerate(counts.most_common(WORDS - 3))}
    chats = []
    for row in rows:
        asked = [1, *(known.get(word, 0) for word in words(prompt_of(row)))][: LENGTH // 2]
        answer = [*(known.get(word, 0) for word in words(row.response)), 2]
        tokens = np.array([*asked, *answer][:LENGTH], np.int32)
        if len(tokens) >= SHORTEST and len(tokens) > len(asked):
            chats.append(EncodedChat(tokens, len(asked)))
    return chats


@cache
def data(source: str, small: bool) -> Data:
    """The file's rows, encoded and dealt out to their uses."""
    pool = encoded(read_rows(source).require(300))
    pairs, count = (8, 8) if small else (48, 48)
    rng = np.random.default_rng(SEED)
    references = pool[-count:]
    own = [pool[i] for i in rng.permutation(len(pool) - count)]
    candidates, prompts = [], []
    for number, chat in enumerate(own[:pairs]):
        replaced = rng.random(len(chat.tokens)) < rng.uniform(0.1, 0.8)
        replaced[: chat.prompt_length] = False
        other = np.where(replaced, rng.integers(3, WORDS, len(chat.tokens)), chat.tokens)
        candidates += [chat, EncodedChat(other.astype(np.int32), chat.prompt_length)]
        prompts += [number, number]
    return Data(own[pairs:], candidates, prompts, references)


def text_of(row: Row) -> str:
    return f"{prompt_of(row)} {row.response}"


def prompt_of(row: Row) -> str:
    return f"{row.instruction}\n{row.input}"


MODEL = Model(
    ModelConfig(
        family="llama",
        vocab_size=WORDS,
        hidden_size=96,
        intermediate_size=256,
        num_layers=4,
        num_heads=6,
        num_kv_heads=3,
        head_dim=16,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
)


@cache
def rule(optimizer: str, clip: bool) -> optax.GradientTransformation:
    """The update rule with its rate in the state, so that all rates share programs."""

    def made(learning_rate: Any) -> optax.GradientTransformation:
        if optimizer == "sgd":
            last = optax.sgd(learning_rate)
        else:
            last = optax.adamw(learning_rate, weight_decay=0.0)
        first = optax.clip_by_global_norm(CLIP) if clip else optax.identity()
        return optax.chain(first, last)

    return optax.inject_hyperparams(made)(learning_rate=0.0)


@cache
def training_step(model: Model) -> Callable[[Any, Any, Any], tuple[Any, Any, Any]]:
    """An AdamW step on a batch's mean token loss, at the rate in the optimizer's state."""
    loss, tx = MeanLoss(TokenLosses(model)), rule("adamw", False)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

    return step


def warm_up(
    model: Model,
    params: Any,
    rows: Sequence[EncodedChat],
    *,
    steps: int,
    size: int = WARMUP_BATCH,
    rate: float = WARMUP_RATE,
    length: int = LENGTH,
    seed: int = SEED,
) -> tuple[Any, Any, list[float]]:
    """Float32 parameters, AdamW's state and the losses of ``steps`` while the rate ramps up."""
    state = rule("adamw", False).init(params)
    rng, losses = np.random.default_rng(seed), []
    for number in range(steps):
        drawn = [rows[i] for i in rng.integers(len(rows), size=size)]
        layout = [[i] for i in range(len(drawn))]
        batch = pack(drawn, layout, row_length=length, slots=length)
        state = with_rate(state, rate * (number + 1) / steps)
        params, state, value = training_step(model)(params, state, batch)
        losses.append(float(value))
    return params, state, losses


@cache
def warmed_up(source: str, small: bool) -> tuple[Any, Any, list[float]]:
    """The warm-up of this study's student."""
    params = MODEL.init(jax.random.key(SEED))
    return warm_up(MODEL, params, data(source, small).warmup, steps=4 if small else WARMUP_STEPS)


def with_rate(state: Any, rate: float) -> Any:
    old = state.hyperparams["learning_rate"]
    return state._replace(hyperparams={"learning_rate": jnp.asarray(rate, old.dtype)})


def floats_as(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def measure(
    regime: Regime,
    method: str,
    precision: str,
    options: dict[str, Any],
    source: str,
    small: bool,
) -> dict[str, Any]:
    """Scores of all candidates by one estimator, their shared part and the seconds taken."""
    params, adam, _ = warmed_up(source, small)
    rows = data(source, small)
    dtype = {F64: jnp.float64, PURE: jnp.bfloat16}.get(precision, jnp.float32)
    compute = BF16 if precision == PURE else precision
    tx = rule(regime.optimizer, regime.clip)
    with jax.enable_x64(precision == F64):
        params = floats_as(jax.tree.map(jnp.asarray, params), dtype)
        state = tx.init(params)
        if regime.optimizer == "adamw":
            # The warm-up's moments and counts, whether or not the probe clips.
            leaves = jax.tree.leaves(floats_as(jax.tree.map(jnp.asarray, adam), dtype))
            state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        state = with_rate(state, regime.rate)
        subtracted = compute if method == "exact" or precision == F64 else F32
        reference = chat_reference(
            MODEL,
            rows.references,
            reduction=regime.reduction,
            max_length=LENGTH,
            dtype=subtracted,
            gradient_dtype=compute,
        )
        items = [
            Candidate(str(i), pack([chat], [[0]], row_length=LENGTH, slots=LENGTH))
            for i, chat in enumerate(rows.candidates)
        ]
        start = time.perf_counter()
        probe = Probe(
            MeanLoss(TokenLosses(MODEL, compute)),
            params,
            state,
            tx,
            {"reference": reference},
            gradient_scale=regime.scale,
            block=8,
            chunk=len(items),
            pool=items,
        )
        scores = METHODS[method](probe, **options)(items)
        seconds = time.perf_counter() - start
    return {
        "influence": [one.influence for one in scores],
        "standard_error": [one.standard_error for one in scores],
        "offset": scores[0].offset,
        "seconds_compiling_included": round(seconds, 2),
    }


def summary(found: dict[str, Any], truth: dict[str, Any], prompts: list[int]) -> dict[str, Any]:
    seconds = found["seconds_compiling_included"]
    return {**compare(truth, found, prompts), "seconds_compiling_included": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", required=True, help="instruction rows, 300 or more")
    parser.add_argument("--folder", default="runs/fidelity", type=Path)
    parser.add_argument("--regimes", default=",".join(one.name for one in REGIMES))
    parser.add_argument("--methods", default=",".join(METHODS), help="only rows of these")
    parser.add_argument("--small", action="store_true", help="8 pairs, 4 steps: to try it out")
    parsed = parser.parse_args()
    wanted = [one for one in REGIMES if one.name in parsed.regimes.split(",")]
    parsed.folder.mkdir(parents=True, exist_ok=True)
    source, small = parsed.rows, parsed.small
    known = {
        "warmup": [WARMUP_STEPS, WARMUP_BATCH, WARMUP_RATE],
        "rows": Path(source).name,
        "small": small,
    }
    journal = Journal(parsed.folder / "rows.jsonl", known)
    done = {record["row"]: record["found"] for record in journal.records}

    def row(regime: Regime, name: str, method: str, precision: str, options: Any) -> Any:
        key = f"{regime.name}/{name}/{precision}"
        if key not in done:
            done[key] = measure(regime, method, precision, options, source, small)
            journal.append({"row": key, "found": done[key]})
            print(key, f"{done[key]['seconds_compiling_included']} s", flush=True)
        return done[key]

    prompts = data(source, small).prompts
    results: dict[str, Any] = {}
    for regime in wanted:
        measured = partial(row, regime)
        truth = measured("exact", "exact", F64, {})
        spread = float(np.std(truth["influence"]))
        results[regime.name] = {
            "spread": spread,
            "mean": float(np.mean(truth["influence"])),
            "offset": truth["offset"],
            "positive": float(np.mean(np.array(truth["influence"]) > 0)),
            "rows": [
                {
                    "estimator": name,
                    "precision": precision,
                    "metrics": summary(measured(name, method, precision, options), truth, prompts),
                }
                for name, method, precision, options in ROWS
                if method in parsed.methods.split(",")
                and not (regime.optimizer == "sgd" and method == "less")
            ],
        }
        lines = [
            ((row["estimator"], row["precision"]), row["metrics"])
            for row in results[regime.name]["rows"]
        ]
        print(f"\n{regime.name}\n{table(('estimator', 'precision'), lines)}", flush=True)
    _, _, losses = warmed_up(source, small)
    rows = data(source, small)
    about = {
        "parameters": MODEL.parameter_count(),
        "candidates": len(rows.candidates),
        "references": len(rows.references),
        "reference_tokens": sum(chat.response_length for chat in rows.references),
        "warmup_loss": [losses[0], losses[-1]],
        "warmup": known["warmup"],
    }
    if not small:
        write_result("fidelity", {**about, "regimes": results})


if __name__ == "__main__":
    main()
