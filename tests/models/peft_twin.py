"""A tiny Llama with random adapters in peft, and the same numbers as ours: the oracle for LoRA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from montessori_jax.models import Model, Params
from montessori_jax.models.families import family_of
from montessori_jax.models.lora import LoraModel, LoraSpec
from montessori_jax.models.weights import to_params
from tests.models import tiny

CONFIG = {**tiny.CONFIG, "num_hidden_layers": 2}


class Twins(NamedTuple):
    """Ours and peft's model with the same base and the same adapter."""

    ours: LoraModel
    adapter: Params
    theirs: PeftModel


def twins(targets: tuple[str, ...] = ("all-linear",), *, b: float = 0.1, **options: Any) -> Twins:
    """Base, ``A`` and ``B`` random; ``b`` is the size of ``B``, 0 for an adapter that is fresh."""
    rank, alpha = options.get("rank", 3), options.get("alpha", 6.0)
    base = tiny.torch_model(CONFIG)
    config = family_of(CONFIG, "test")
    params = to_params(config, tiny.state(base))
    spec = LoraSpec(rank, alpha, targets, options.get("rslora", False))
    theirs = get_peft_model(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="all-linear" if targets == ("all-linear",) else list(targets),
            use_rslora=spec.rslora,
            task_type="CAUSAL_LM",
        ),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                size = b if "lora_B" in name else 0.3
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    weights = {n: p.detach().numpy() for n, p in theirs.named_parameters() if ".lora_" in n}
    return Twins(LoraModel(config, params, spec), to_tree(weights), theirs.eval())


def to_tree(tensors: dict[str, np.ndarray]) -> Params:
    """peft's tensors (or their gradients), by name, as our tree: transposed and stacked."""
    layers: Params = {}
    for module, (part, ours) in tiny.MATRICES.items():
        for side in ("A", "B"):
            found = [
                tensors[name].T
                for layer in range(CONFIG["num_hidden_layers"])
                for name in tensors
                if f".layers.{layer}.{module}.lora_{side}." in name
            ]
            if found:
                place = layers.setdefault(part, {}).setdefault(ours, {})
                place[f"lora_{side.lower()}"] = jnp.asarray(np.stack(found))
    return {"layers": layers}


@jax.jit
def logits(model: Model, params: Params, tokens: np.ndarray) -> jax.Array:
    """`tiny.jax_logits` as one program; a LoRA model's base is one of its arguments."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(params, tokens, jnp.ones_like(tokens), positions)
    return hidden @ model.head(params)
