"""A device that is too small is one line; other failures stay what they are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from montessori_jax.config import DpoConfig, InfluenceConfig, SftConfig
from montessori_jax.costs import Meter
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import UserError
from montessori_jax.models import sources
from montessori_jax.models.lora import LoraModel
from montessori_jax.models.sources import load_model
from montessori_jax.stages import dpo, student, trained
from montessori_jax.training import loop
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.sft import train_sft
from montessori_jax.work import Work
from tests.models.tiny import CONFIG, write_folder
from tests.training import samples


def too_much(*_: Any, **__: Any) -> Any:
    """The device's own error."""
    return jnp.zeros(1 << 46, jnp.int8).block_until_ready()  # 64 TiB


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny", CONFIG))


def test_what_does_not_fit_names_the_setting():
    said = r"^influence does not fit .* lower block \(now 3\), or"
    with pytest.raises(UserError, match=said), fits_in_memory("influence", "lower block (now 3)"):
        too_much()


def test_other_failures_pass():
    other = jax.errors.JaxRuntimeError("INVALID_ARGUMENT: another thing")
    with pytest.raises(type(other), match="INVALID"), fits_in_memory("influence", "lower block"):
        raise other


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("float32", "it is float32 here: to write or evaluate set the stage's dtype"),
        ("bfloat16", "take a smaller model, or end what else uses the device"),
    ],
)
def test_a_model_that_is_loaded(folder, dtype, advice, monkeypatch):
    monkeypatch.setattr(sources, "load_folder", too_much)
    with pytest.raises(UserError, match=f"^the model .*tiny does not fit in .*: {advice}"):
        load_model(folder, dtype=dtype)


def test_a_student_with_its_moments(folder, monkeypatch):
    monkeypatch.setattr(student, "make_optimizer", lambda *_: SimpleNamespace(init=too_much))
    said = r"^the student .*tiny with its optimizer's moments does not fit .*\(warmup.lora_rank\)"
    with pytest.raises(UserError, match=said):
        student.open_student(folder, InfluenceConfig(learning_rate=1e-3))


def test_an_adapter_and_what_is_written(folder, tmp_path, monkeypatch):
    loaded = load_model(folder)
    monkeypatch.setattr(LoraModel, "init", too_much)
    with pytest.raises(UserError, match=r"^the adapter does not fit .*lora_rank \(now 4\)"):
        trained.to_train(loaded, SftConfig(lora_rank=4), 0)
    monkeypatch.setattr(trained, "save_folder", too_much)
    with pytest.raises(UserError, match=r"^writing the trained model does not fit"):
        trained.export(tmp_path, "student", loaded.model, loaded.params, loaded, "A card.")


@pytest.mark.parametrize(
    ("owner", "name", "what"),
    [
        (Checkpoints, "restore", "the state that training starts from"),
        (loop, "place_rows", "the first batch"),
    ],
)
def test_what_training_begins_with(owner, name, what, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, name, too_much)
    model, params = samples.student()
    with pytest.raises(UserError, match=rf"^{what} does not fit .*micro_batch \(now 3\)"):
        train_sft(
            model,
            params,
            samples.chats(4),
            SftConfig(micro_batch=3, max_length=24),
            seed=0,
            checkpoints=Checkpoints(tmp_path, 1, print),
        )


def test_a_state_that_does_not_fit_stays_on_the_disk(tmp_path, monkeypatch):
    model, params = samples.student()
    settings = SftConfig(batch_size=1, micro_batch=1, max_length=24, checkpoint_every=1)
    folder = tmp_path / "checkpoints"

    def train():
        checkpoints = Checkpoints(folder, 2, print)
        train_sft(model, params, samples.chats(4), settings, seed=0, checkpoints=checkpoints)

    train()
    there = Checkpoints(folder, 2, print).steps()
    assert there
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", too_much)
        with pytest.raises(UserError, match=r"^the state that training starts from does not fit"):
            train()
    assert Checkpoints(folder, 2, print).steps() == there


@pytest.mark.parametrize(
    ("what", "name", "passes"),
    [
        ("the pass over the pairs before DPO", "reference_log_probs", 0),
        ("the probe of the teacher before DPO", "greedy_texts", 0),
        ("the probe of the teacher before DPO", "pair_log_probs", 0),
        ("the pass over the held-out pairs after DPO", "pair_log_probs", 1),
        ("the probe of the tuned teacher", "pair_log_probs", 2),
    ],
)
def test_dpo_beside_its_steps(what, name, passes, folder, tmp_path, monkeypatch):
    """``passes`` calls of ``name`` fit; training itself is left out."""

    def zeros(model: Any, params: Any, pairs: Any, *_: Any, **__: Any) -> list[np.ndarray]:
        return [np.zeros(pair.targets, np.float32) for pair in pairs]

    def train(model: Any, params: Any, *_: Any, metrics: Any, **__: Any) -> Any:
        names = ("loss", "reward_margin", "kl")
        metrics({"step": 1, "steps": 1, "tokens": 1, **dict.fromkeys(names, 0.0)})
        return SimpleNamespace(params=params)

    def after(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return (too_much if len(calls) > passes else zeros)(*arguments, **options)

    calls: list[int] = []
    monkeypatch.setattr(dpo, "reference_log_probs", zeros)
    monkeypatch.setattr(dpo, "pair_log_probs", zeros)
    monkeypatch.setattr(dpo, "greedy_texts", lambda teacher, pairs: list(pairs[:1]))
    monkeypatch.setattr(dpo, "train_dpo", train)
    monkeypatch.setattr(dpo, name, after)
    rows = Path(tmp_path / "pairs.jsonl")
    row = {"prompt": "w5 w6", "chosen": "w7 w8", "rejected": "w9"}
    rows.write_text(json.dumps(row) + "\n")
    work = Work(tmp_path / "dpo", 0, Meter(None, "dpo"), quiet=True)
    settings = DpoConfig(micro_batch=3)
    said = rf"^{what} does not fit .* lower dpo.micro_batch \(now 3\)"
    with pytest.raises(UserError, match=said):
        dpo.dpo(load_model(folder), str(rows), settings, work, heldout=str(rows), probe=True)
