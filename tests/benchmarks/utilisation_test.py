"""The utilisation benchmark: what it counts, and a small form of it on a CPU."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import utilisation
from benchmarks.utilisation import Counted
from montessori_jax.config import SftConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import pack
from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.models.attention_kernels import choose
from montessori_jax.plan.products import products_of
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.pairs import EncodedPair
from montessori_jax.training.state import start
from montessori_jax.training.steps import sft_step

SMALL = utilisation.SMALL.model


def chat(prompt: int, response: int) -> EncodedChat:
    return EncodedChat(np.arange(prompt + response, dtype=np.int32), prompt)


def test_the_model_is_tinyllama():
    # The count on the model's card; all but the input embedding and 45 norms are multiplied by.
    config = utilisation.TINYLLAMA
    assert Model(config).parameter_count() == 1_100_048_384
    assert sum(utilisation.weights(config)) == 1_100_048_384 - 32000 * 2048 - 45 * 2048


def test_counts_by_hand():
    # Samples of 5 and 2 tokens: 25 + 4 keys in all, 15 + 3 of them not behind their query.
    assert utilisation.count_chats([chat(3, 2), chat(1, 1)]) == Counted(7, 3, 29, 18)
    # Rows of 5 and 7 tokens whose first 3 are the same and counted once.
    pair = EncodedPair("a", chat(3, 2), chat(3, 4))
    assert utilisation.count_pairs([pair]) == Counted(9, 6, 25 + 49 - 9, 15 + 28 - 6)


def test_the_published_formula_is_what_the_traced_step_multiplies():
    """One sample that fills its row: the plain kernel computes the whole square."""
    length = 64
    sample = chat(1, length - 1)
    settings = SftConfig(remat="none", attention="xla")
    tx = make_optimizer(settings, 1)
    model = Model(SMALL)
    batch = pack([sample], [[0]], row_length=length, slots=length)
    batch = jax.tree.map(lambda leaf: leaf[None], batch)
    state = jax.eval_shape(lambda key: start(model.init(key), tx), jax.random.key(0))
    traced = products_of(jax.make_jaxpr(sft_step(model, tx, settings))(state, batch)).flops
    again = 2.0 * utilisation.weights(SMALL)[1] * length  # logits are made twice, counted once
    counted = utilisation.count_chats([sample])
    assert traced - again == utilisation.published_flops(SMALL, counted)
    assert utilisation.needed_flops(SMALL, counted) < utilisation.published_flops(SMALL, counted)


def test_what_is_needed_by_hand():
    # A layer: q and o 32x32, k and v 32x16, three of 32x64; the head 32x128; 4 heads of 8.
    layers, head = 2 * (2 * 1024 + 2 * 512 + 3 * 2048), 32 * 128
    step = Counted(tokens=7, targets=3, square=29, seen=18)
    attention = 12 * 2 * 4 * 8
    needed = 6 * (layers * 7 + head * 3) + attention * 18
    assert utilisation.needed_flops(SMALL, step) == needed
    assert utilisation.published_flops(SMALL, step) == 6 * (layers + head) * 7 + attention * 29


def test_utilisation_is_of_one_device(monkeypatch):
    monkeypatch.setattr(utilisation, "device_peak", lambda: 1e9 * jax.device_count())
    step = Counted(tokens=1000, targets=500, square=10**6, seen=10**6 // 2)
    found = utilisation.rates(SMALL, [step, step, step], [0.5, 1.0, 8.0])
    flops = utilisation.published_flops(SMALL, step)  # in the median second
    assert found["model_flop_utilisation"] == pytest.approx(flops / 1e9, abs=5e-5)
    assert found["tokens_per_second"] == 1000
    assert 0 < found["needed_flop_utilisation"] < found["model_flop_utilisation"]


def test_the_best_variant_of_a_kind_counts():
    def at(value: float | None) -> dict[str, float | None]:
        return {"model_flop_utilisation": value}

    found = utilisation.reached({"sft:none": {"failed": "memory"}, "sft:full": at(0.4)})
    assert found == {"sft": True}
    below = {"sft:none": at(0.41), "dpo:none": at(0.39)}
    assert utilisation.reached(below) == {"sft": True, "dpo": False}
    assert utilisation.reached({"dpo:none": {"failed": "memory"}}) == {"dpo": False}
    assert utilisation.reached({"dpo:none": at(None)}) == {"dpo": None}


@pytest.mark.parametrize("kind", utilisation.KINDS)
def test_rows_are_packed_to_their_length(kind):
    batches, counted = utilisation.batches_of(kind, utilisation.FULL, 4, 2)
    tokens = [(one if kind == "sft" else one.batch).tokens for one in batches]
    assert len({rows.shape for rows in tokens}) == 1  # one program
    assert tokens[0].shape[1:] == (4, {"sft": 2048, "dpo": 1536}[kind])
    real = sum(step.tokens for step in counted) / sum(rows.size for rows in tokens)
    assert real > {"sft": 0.9, "dpo": 0.7}[kind]
    heads = (utilisation.TINYLLAMA.num_heads, utilisation.TINYLLAMA.head_dim)
    query = jax.ShapeDtypeStruct((*tokens[0].shape[1:], *heads), jnp.bfloat16)
    branches = kind == "dpo"
    assert choose("auto", query, branches=branches, soft_cap=None, backend="gpu") == "cudnn"


def test_memory_that_is_not_enough_names_the_option(monkeypatch):
    monkeypatch.setattr(utilisation, "start", lambda *_: jnp.zeros(1 << 46, jnp.int8))
    with pytest.raises(UserError, match=r"^dpo:none does not fit .* --micro-batch \(now 2\)"):
        utilisation.run_variant("dpo:none", utilisation.SMALL, 2, 1)


def test_the_small_form_writes_its_result(tmp_path: Path):
    small = ["--small", "--steps", "1", "--micro-batch", "2", "--out", str(tmp_path)]
    assert utilisation.main([*small, "--only", "dpo:full"]) == 0
    written = json.loads((tmp_path / "utilisation-small.json").read_text())
    assert {"commit", "date", "machine", "packages"} <= written.keys()
    result = written["result"]
    assert result["reached"] == {"dpo": None}  # a CPU's peak is not known
    holds_all(result["variants"]["dpo:full"])


def test_the_small_form_of_sft():
    holds_all(utilisation.run_variant("sft:none", utilisation.SMALL, 2, 1))


def holds_all(found: dict[str, Any]) -> None:
    assert found["model_flop_utilisation"] is None
    assert found["tokens_per_second"] > 0
    assert found["model_tflops_per_second"] > 0
    assert found["compile_seconds"] > 0
    assert found["peak_memory_gib"] > 0
    assert found["device"] == "cpu"
