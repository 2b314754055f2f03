"""What a training stage trains and what it leaves: a whole model, or a LoRA adapter on it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from montessori_jax import cluster
from montessori_jax.config import TrainingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.mesh import fetch, mesh_of
from montessori_jax.models import Model, Params
from montessori_jax.models.adapter_folder import save_adapter
from montessori_jax.models.folder import save_folder
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.lora import LoraModel, LoraSpec
from montessori_jax.models.sharding import laid_out
from montessori_jax.models.weights import stored_views
from montessori_jax.seeding import derive_seed


def to_train(loaded: LoadedModel, settings: TrainingConfig, seed: int) -> tuple[Model, Params]:
    """``loaded``'s model and parameters; with ``lora_rank`` a fresh adapter on it, keyed by seed.

    Raises:
        UserError: a LoRA target names no layer, or the adapter does not fit in memory.
    """
    if not settings.lora_rank:
        return loaded.model, loaded.params
    spec = LoraSpec(
        settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.lora_rslora
    )
    model = LoraModel(loaded.model.config, loaded.params, spec)
    with fits_in_memory("the adapter", f"lower lora_rank (now {settings.lora_rank})"):
        params = model.init(jax.random.key(derive_seed(seed, "lora")))
        return model, laid_out(model, params, mesh_of(loaded.params))


def lora_notes(model: Model, settings: TrainingConfig) -> dict[str, Any]:
    """What a checkpoint of ``model``'s ``params`` says of LoRA, for `with_adapter`."""
    if not isinstance(model, LoraModel):
        return {}
    return {"lora": {**asdict(model.spec), "base_dtype": settings.lora_base_dtype}}


def with_adapter(loaded: LoadedModel, notes: dict[str, Any]) -> Model:
    """The model whose ``params`` a checkpoint holds, from its notes and its base."""
    lora = notes.get("lora")
    if lora is None:
        return loaded.model
    spec = LoraSpec(lora["rank"], lora["alpha"], tuple(lora["targets"]), lora["rslora"])
    return LoraModel(loaded.model.config, loaded.params, spec)


def step_flops(model: Model) -> float:
    """Floating-point operations to train on one token: LoRA makes no gradient of the weights."""
    return (4.0 if isinstance(model, LoraModel) else 6.0) * model.parameter_count()


@fits_in_memory("writing the trained model", "end what else uses the device")
def export(
    folder: Path,
    name: str,
    model: Model,
    params: Params,
    loaded: LoadedModel,
    card: str,
    *,
    consume: bool = True,
) -> None:
    """Write ``folder/name``, a Hugging Face folder that needs no adapter.

    With LoRA also ``folder/adapter``, in peft's layout. With ``consume`` the base is used up: its
    kernels are freed as they are merged. A model that brought no chat template gets the one that
    it was trained with, so that whoever loads the folder writes the same turns.
    """
    if not loaded.tokenizer.chat_template:
        loaded.tokenizer.chat_template = ChatFormat.of(loaded).template
    dtype, plain = "float32", model
    if isinstance(model, LoraModel):
        plain = model.decoder
        adapter = fetch(params)
        save_adapter(folder / "adapter", plain, adapter, model.spec, base=loaded.name)
        dtype = str(jax.tree.leaves(model.base)[0].dtype)
        params = model.merged(params, consume=consume)
    if not cluster.is_leader():
        for _ in stored_views(plain.config, params):  # it takes all processes to collect a tensor
            pass
        return
    save_folder(
        folder / name, plain, params, loaded.tokenizer, loaded.generation, dtype=dtype, card=card
    )
