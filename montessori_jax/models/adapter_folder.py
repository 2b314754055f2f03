"""LoRA adapters as folders that peft and vLLM read and write: ``adapter_config.json`` and tensors.

Tensor names come from the family's table: ``base_model.model.{module}.lora_A.weight`` is ``A``
transposed, ``[rank, inputs]``, and ``lora_B`` is ``[outputs, rank]``.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.decoder import Model, Params
from montessori_jax.models.families import Row
from montessori_jax.models.lora import (
    ALL_LINEAR,
    LoraSpec,
    adapter_shapes,
    leaf_at,
    module,
    nest,
    target_rows,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}
# Keys of peft's configuration that make an adapter something else than `LoraSpec` can say, each
# with the values that leave it alone.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


def save_adapter(
    path: str | Path, model: Model, adapter: Params, spec: LoraSpec, *, base: str = ""
) -> None:
    """Write ``adapter`` in peft's layout; equal inputs give equal bytes.

    Args:
        path: the folder; made if need be, an earlier adapter in it is replaced.
        model: the base's decoder.
        adapter: float32 arrays as `init_adapter` has them.
        spec: its rank, scale and targets.
        base: name of the base model, for whoever loads the adapter; ``hf:`` is left out.

    Raises:
        UserError: the folder cannot be written.
    """
    folder, config = Path(path), model.config
    rows = target_rows(config, spec.targets)
    tensors = {}
    for row in rows:
        place = leaf_at(adapter, row.path[:-1])
        for ours, theirs in PARTS.items():
            stacked = np.asarray(place[ours])
            for layer in range(config.num_layers):
                tensors[_name(row, layer, theirs)] = np.ascontiguousarray(stacked[layer].T)
    alpha = int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha
    settings: dict[str, Any] = {
        "base_model_name_or_path": base.removeprefix("hf:") or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _short_names(config, rows),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.rslora,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        _replace(folder / CONFIG, (text + "\n").encode())
    except OSError as error:
        raise UserError(f"{folder}: the adapter cannot be written: {error.strerror}") from None


def load_adapter(path: str | Path, model: Model) -> tuple[LoraSpec, Params]:
    """Read an adapter of ``model`` that `save_adapter` or peft wrote; bit for bit if float32.

    Which layers it adapts is read from its tensors.

    Raises:
        UserError: files that are missing or broken, settings beyond plain LoRA, or tensors that
            are not those of this model, by name.
    """
    folder = Path(path)
    settings = read_adapter_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / WEIGHTS}: cannot be read as safetensors ({reason})") from None
    config = model.config
    rows = tuple(
        row
        for row in target_rows(config, (ALL_LINEAR,))
        if any(_name(row, layer, "lora_A") in tensors for layer in range(config.num_layers))
    )
    if not rows:
        first = next(iter(sorted(tensors)), "(none)")
        raise UserError(
            f"{folder}: adapts no linear layer of this {config.family} model; its first tensor is "
            f"{first}"
        )
    spec = LoraSpec(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        targets=tuple(_short_names(config, rows)),
        rslora=bool(settings.get("use_rslora", False)),
    )
    shapes = adapter_shapes(model, spec)

    def stacked(row: Row, ours: str) -> jax.Array:
        wanted = leaf_at(shapes, (*row.path[:-1], ours)).shape
        target = np.empty(wanted, np.float32)
        for layer in range(config.num_layers):
            name = _name(row, layer, PARTS[ours])
            if name not in tensors:
                raise UserError(f"{folder}: {name} is missing: every layer must be adapted")
            found = tensors.pop(name)
            if found.T.shape != wanted[1:]:
                raise UserError(
                    f"{folder}: {name} is {list(found.shape)}, this model and rank {spec.rank} "
                    f"want {list(wanted[:0:-1])}"
                )
            target[layer] = found.T
        return jnp.asarray(target)

    adapter = nest(rows, lambda row: {ours: stacked(row, ours) for ours in PARTS})
    if tensors:
        raise UserError(f"{folder}: unknown tensors: {', '.join(sorted(tensors)[:3])}")
    return spec, adapter


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """A folder's ``adapter_config.json``, if it is that of plain LoRA.

    Raises:
        UserError: it cannot be read, or says what is not supported, by name.
    """
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; is this an adapter's folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(f"{file}: 'peft_type' is not LORA; other adapters are not supported")
    for key, allowed in PLAIN.items():
        if key in settings and settings[key] not in allowed:
            raise UserError(f"{file}: '{key}' is {settings[key]!r}, which is not supported")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{file}: 'r' is {rank!r}, expected a whole number above 0")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"{file}: 'lora_alpha' is {alpha!r}, expected a number")
    return settings


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a folder that holds an adapter and no whole model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def adapter_files(folder: Path) -> list[Path]:
    """The files that an adapter is made of; raises `UserError` where the tensors are missing."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: has no {WEIGHTS}; is the adapter still being copied?")
    return [folder / CONFIG, folder / WEIGHTS]


def _name(row: Row, layer: int, part: str) -> str:
    return f"{PREFIX}{module(row).format(layer=layer)}.{part}.weight"


def _short_names(config: ModelConfig, rows: tuple[Row, ...]) -> list[str]:
    """Names for ``target_modules``: last parts, or more where those would say too much."""
    last = Counter(_last(row) for row in target_rows(config, (ALL_LINEAR,)))
    chosen = Counter(_last(row) for row in rows)
    names = [
        _last(row) if chosen[_last(row)] == last[_last(row)] else _within_layer(row) for row in rows
    ]
    return sorted(set(names))


def _last(row: Row) -> str:
    return module(row).rpartition(".")[2]


def _within_layer(row: Row) -> str:
    return module(row).partition("{layer}.")[2]


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)
