"""A student to probe: a warmed-up checkpoint, or any model with a fresh optimizer state."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array

from montessori_jax.config import InfluenceConfig, OptimizerConfig
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import UserError
from montessori_jax.influence.scoring import Student
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model
from montessori_jax.runs import value_hash
from montessori_jax.stages.trained import with_adapter
from montessori_jax.training.checkpoints import load_student, read_about
from montessori_jax.training.optimizer import make_optimizer, probe_optimizer
from montessori_jax.training.state import TrainState
from montessori_jax.work import STATE


@dataclass(frozen=True)
class ProbeStudent:
    """What a probe step starts from.

    ``tx`` is the probe's update at ``learning_rate``; ``warm`` is whether the optimizer's state
    comes from a warm-up; ``fingerprint`` changes with parameters and state. After a LoRA warm-up
    the parameters are the adapter, and the model holds the base.
    """

    loaded: LoadedModel
    state: TrainState
    tx: optax.GradientTransformation
    learning_rate: float
    warm: bool
    fingerprint: str

    @property
    def probed(self) -> Student:
        """What `montessori_jax.influence.score_candidates` takes first."""
        return Student(self.loaded.model, self.loaded.params, self.state.opt_state, self.tx)


def open_student(name: str, settings: InfluenceConfig, mesh: Mesh | None = None) -> ProbeStudent:
    """Open ``name``: a folder written by a warm-up, or the name of a model; onto ``mesh``.

    Raises:
        UserError: no such student; the warm-up was on another model or another optimizer than
            asked for; a fresh student is given no learning rate; or student and moments do not
            fit in the devices' memory.
    """
    advice = "warm up an adapter (warmup.lora_rank), whose moments are small"
    with fits_in_memory(f"the student {name} with its optimizer's moments", advice):
        return _open(name, settings, mesh)


def _open(name: str, settings: InfluenceConfig, mesh: Mesh | None) -> ProbeStudent:
    # A warm-up's folder, or the state itself, which has a part of that name too.
    state_folder = epath.Path(name) / STATE
    about = read_about(state_folder)
    if about is None:
        state_folder = epath.Path(name)
        about = read_about(state_folder)
    if about is None:
        return _fresh(name, settings, mesh)
    base = about["about"]
    held = base.get("lora", {}).get("base_dtype", "float32")
    loaded = load_model(base["model"], dtype=jnp.dtype(held), mesh=mesh)
    if loaded.fingerprint != base["fingerprint"]:
        raise UserError(
            f"{name}: was warmed up from {base['model']}, which has changed since: warm up again"
        )
    _check_moments(name, about["settings"], settings)
    model = with_adapter(loaded, base)
    student = load_student(state_folder, model, mesh)
    # A probe keeps no moments, so it need not narrow them again.
    trained = replace(student.settings, moments_dtype="float32")
    if settings.optimizer != trained.optimizer and settings.optimizer == "adamw":
        raise UserError(
            f"{name}: was warmed up with {trained.optimizer}, which left no AdamW moments: give "
            f"--optimizer {trained.optimizer}, or warm up with adamw"
        )
    state = student.state._replace(opt_state=jax.tree.map(_widened, student.state.opt_state))
    if settings.optimizer != trained.optimizer:
        trained = replace(trained, optimizer=settings.optimizer)
        state = state._replace(opt_state=make_optimizer(trained, 1).init(state.params))
    rate = settings.learning_rate or student.learning_rate
    return ProbeStudent(
        loaded=replace(loaded, model=model, params=state.params),
        state=state,
        tx=probe_optimizer(trained, rate),
        learning_rate=rate,
        warm=True,
        fingerprint=value_hash(about),
    )


def _check_moments(name: str, trained: dict[str, Any], settings: InfluenceConfig) -> None:
    """Refuse moments that were kept in bfloat16, which move every score, unless asked for."""
    narrow = trained.get("moments_dtype") == "bfloat16" and settings.optimizer == "adamw"
    if narrow and settings.preset != "original":
        raise UserError(
            f"{name}: was warmed up with moments_dtype bfloat16, and influence by adamw starts "
            "from those moments: warm it up with float32 ones, or give --preset original, whose "
            "moments are bfloat16"
        )


def _widened(leaf: Array) -> Array:
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def _fresh(name: str, settings: InfluenceConfig, mesh: Mesh | None) -> ProbeStudent:
    loaded = load_model(name, mesh=mesh)
    if settings.learning_rate is None:
        raise UserError(
            f"{name} was not warmed up, so its learning rate is not known: give --learning-rate "
            "(the paper's is 5e-6), or --warmup FILE"
        )
    rule = OptimizerConfig(optimizer=settings.optimizer, learning_rate=settings.learning_rate)
    state = TrainState(
        loaded.params, make_optimizer(rule, 1).init(loaded.params), jnp.zeros((), jnp.int32)
    )
    return ProbeStudent(
        loaded=loaded,
        state=state,
        tx=probe_optimizer(rule, settings.learning_rate),
        learning_rate=settings.learning_rate,
        warm=False,
        fingerprint=loaded.fingerprint,
    )
