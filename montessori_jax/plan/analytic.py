"""What stages hold by counting alone, where no compiler is asked (GPUs).

Weights, gradients, moments and the largest activations; what a compiler lays beside them is not
known here, so what fits by little may not fit. Arithmetic by `2 N` a token forward and `6 N` with a
gradient, `8 N` where layers are computed again; what chips say to each other is not counted.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax

from montessori_jax.config import RunConfig, TrainingConfig
from montessori_jax.influence.costs import costs
from montessori_jax.influence.memory import COPIES_PER_LANE
from montessori_jax.mesh import AXES, sampling_ways, sizes_of, write_together
from montessori_jax.models import Model, ModelConfig
from montessori_jax.plan.stages import AUDIT, Recipe, Stages, gathered, groups_of
from montessori_jax.plan.targets import Target
from montessori_jax.plan.work import WRITTEN, work_of, written_as
from montessori_jax.training.losses import CHUNK

CARDS = 8  # of a host, whose texts are its own
WITH_GRADIENT = 8  # bytes of a trained parameter and of its gradient, in float32
MOMENTS = 8  # bytes of AdamW's two of a parameter in float32


class _Slot(NamedTuple):
    """Stands for a GPU where a mesh's sizes are worked out."""

    platform: str = "gpu"
    process_index: int = 0


@dataclass(frozen=True)
class Held:
    """Bytes of one chip in a stage, by what they are for, and its arithmetic.

    Attributes:
        stage: of `montessori_jax.plan.stages.GROUPS`, several joined by ``+``.
        name: what it does there.
        parts: bytes by what they are for.
        flops: of one run, all chips together.
        runs: how often an iteration of the loop does it.
        read: bytes of weights that a chip reads in one run where that takes time; else 0.
        lower: the settings that make it smaller, the first one first.
        stages: the loop's stages that do it, and how often.
    """

    stage: str
    name: str
    parts: dict[str, float]
    flops: float
    runs: float
    lower: tuple[str, ...]
    read: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def adapter_parameters(model: Model, rank: int) -> int:
    """Parameters of adapters on all linear layers but the head: ``rank (in + out)`` each."""
    leaves = jax.tree_util.tree_leaves_with_path(model.shapes()["layers"])
    return sum(
        leaf.shape[0] * rank * (leaf.shape[1] + leaf.shape[2])
        for path, leaf in leaves
        if path[-1].key == "kernel"
    )


def trained_bytes(model: Model, settings: TrainingConfig) -> dict[str, float]:
    """Weights, gradients and moments of a stage that trains, on all chips together."""
    count, each = model.parameter_count(), WITH_GRADIENT
    if settings.optimizer == "adamw":
        each += MOMENTS // (2 if settings.moments_dtype == "bfloat16" else 1)
    if not settings.lora_rank:
        return {"weights, gradient and moments": float(each * count)}
    narrow = 2 if settings.lora_base_dtype == "bfloat16" else 4
    adapters = adapter_parameters(model, settings.lora_rank)
    return {"frozen weights": float(narrow * count), "adapters": float(each * adapters)}


def training_activations(
    config: ModelConfig, rows: int, length: int, settings: TrainingConfig
) -> float:
    """Of a backward pass: a layer's inputs (``remat: full``), one layer's inside, logits.

    Without rematerialisation every layer's inside is kept.
    """
    wide = 2 if settings.dtype == "bfloat16" else 4
    tokens = rows * length
    inputs = config.num_layers * tokens * config.hidden_size * wide
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    inside = tokens * (4 * config.hidden_size + heads + 4 * config.intermediate_size) * wide
    layers = 1 if settings.remat == "full" else config.num_layers
    return inputs + layers * inside + 3 * CHUNK * config.vocab_size * 4


def counting(
    config: RunConfig, teacher: ModelConfig, student: ModelConfig, target: Target
) -> "Counting":
    """What counts the programs of a config on ``target``, with its mesh."""
    slots = [_Slot()] * target.chips
    own = min(target.chips, CARDS)
    together = write_together(config.mesh, own, target.chips)
    return Counting(
        config,
        teacher,
        student,
        dict(zip(AXES, sizes_of(config.mesh, "training", slots), strict=True)),
        *((1, target.chips) if together else (math.ceil(target.chips / CARDS), own)),
    )


def held(stages: Stages, by_count: "Counting") -> list[Held]:
    """What each program of ``stages`` holds on one chip."""
    found = []
    for shared in gathered(stages.config, stages.uses):
        amount = sum(use.amount for use in shared)
        by_stage: dict[str, float] = {}
        for use in shared:
            by_stage[use.stage] = by_stage.get(use.stage, 0.0) + use.amount
        one = by_count.of(shared[0].recipe, amount)
        runs = {name: one.runs * part / (amount or 1) for name, part in by_stage.items()}
        found.append(replace(one, stage=groups_of(shared), stages=runs))
    return found


@dataclass(frozen=True)
class Counting:
    """Counts programs of a config; ``sizes`` are the mesh's, ``hosts`` those that write, each with
    so many ``cards``."""

    config: RunConfig
    teacher: ModelConfig
    student: ModelConfig
    sizes: dict[str, int]
    hosts: int
    cards: int

    @property
    def ways(self) -> int:
        """Over how many chips a copy of the weights is split."""
        return self.sizes["fsdp"] * self.sizes["tensor"]

    def of(self, recipe: Recipe, amount: float) -> Held:
        """A program by its recipe, for an amount as `Use` has it."""
        kind, section, samples = recipe
        if kind == "write":
            return self.decode(section, samples, amount)
        if kind == "train":
            model = self.teacher if section == "bootstrap" else self.student
            return self.training(section, model, 1, amount)
        if kind == "dpo":
            return self.training("dpo", self.teacher, 2, amount)
        if kind in ("gradient", "score"):
            return self.influence(section, amount)
        if kind == "audit":
            one = self.influence(section, amount)
            return replace(one, name=f"{AUDIT}, {one.name}")
        return self.losses(section, amount)

    def training(self, section: str, model: ModelConfig, factor: int, amount: float) -> Held:
        """An optimizer step of full rows; a pair is a row of twice the length, and the reference
        policy's forward pass is in it."""
        settings: TrainingConfig = getattr(self.config, section)
        length, own = factor * settings.max_length, Model(model)
        parts = {name: count / self.ways for name, count in trained_bytes(own, settings).items()}
        parts["activations"] = training_activations(model, settings.micro_batch, length, settings)
        lora = settings.lora_rank > 0
        each = (4 if lora else 6) + (0 if settings.remat == "none" else 2)
        tokens, runs = settings.batch_size * length, amount / settings.batch_size
        if section == "dpo":
            each += 2
        else:
            runs = amount / tokens
        lower = ("mesh.fsdp", f"{section}.lora_rank", f"{section}.micro_batch")
        return Held(
            section,
            "step",
            parts,
            float(each * own.parameter_count() * tokens),
            runs,
            lower[:1] + lower[2:] if lora else lower,
        )

    def influence(self, method: str, amount: float) -> Held:
        """A candidate of one estimator; without ``method`` the reference gradient."""
        config, model = self.config, Model(self.student)
        settings, work = config.influence, work_of(config)
        whole = trained = model.parameter_count()
        frozen = 0.0
        if config.warmup.lora_rank:
            frozen = trained_bytes(model, config.warmup)["frozen weights"]
            trained = adapter_parameters(model, config.warmup.lora_rank)
        block = settings.block or 1
        moments = MOMENTS if settings.optimizer == "adamw" else 0
        parts = {"student and moments": (frozen + (4 + moments) * trained) / self.ways}
        if method not in ("exact", "linearized"):
            parts["reference gradient"] = 4 * trained / self.ways
        if method:
            parts[f"{block} candidate(s) side by side"] = (
                block * COPIES_PER_LANE * 4 * trained / self.ways
            )
        rows = max(settings.rows_per_pass, block)
        numerics = TrainingConfig(dtype="float32")
        length = settings.max_length
        parts["activations"] = training_activations(self.student, rows, length, numerics)
        costs_of = costs(
            whole, settings.max_length, work.reference_tokens, part=settings.control_fraction
        )
        probe = 6.0 * whole * settings.max_length
        flops = costs_of[method].each if method in costs_of else probe
        if method == "second_order":
            flops = probe + 10.0 * whole * work.reference_tokens
        if not method:
            flops = 6.0 * whole * work.reference_tokens
        name = f"{method}: a candidate" if method else "reference gradient"
        smaller = ("influence.block",) if block > 1 else ()
        last = "influence.rows_per_pass" if self.config.warmup.lora_rank else "warmup.lora_rank"
        lower = (*smaller, "mesh.fsdp", last)
        return Held("influence", name, parts, flops, amount, lower)

    def decode(self, section: str, samples: int, prompts: float) -> Held:
        """A token for all rows of a host; the prompts' own pass is spread over them."""
        settings, kind = getattr(self.config, section), WRITTEN[section]
        model, split = Model(self.teacher), sampling_ways(self.config.mesh)
        count, wide = model.parameter_count(), 4 if settings.dtype == "float32" else 2
        rows = settings.prompts_per_batch * samples
        ways = max(1, self.cards // split)  # of a host's cards, each with rows of its own
        a_token = 2 * self.teacher.num_layers * self.teacher.num_kv_heads * self.teacher.head_dim
        kept = settings.prompts_per_batch * kind.longest + rows * settings.max_tokens
        parts = {
            "weights, as loaded and as laid out for one token at a time": 2 * wide * count / split,
            "keys and values": float(kept * a_token * wide) / (ways * split),
            "logits": 3.0 * rows * self.teacher.vocab_size * 4 / ways,
        }
        here = prompts / self.hosts
        steps = math.ceil(here / settings.prompts_per_batch) * kind.written
        entered = here * kind.prompt / max(steps, 1)
        # All hosts do the same side by side.
        flops = 2.0 * count * (rows + entered) * self.hosts
        lower = (f"{section}.prompts_per_batch", "mesh.sampler")
        name = f"{written_as(section, samples)}: decode"
        return Held("generation", name, parts, flops, steps, lower, wide * count / split)

    def losses(self, section: str, tokens: float) -> Held:
        """A pass of rows whose loss is measured, on a student that is loaded or warmed up."""
        settings, model = self.config.evaluation, Model(self.student)
        count = model.parameter_count()
        wide = 2 if settings.dtype == "bfloat16" and section == "evaluation" else 4
        rows, length = settings.rows_per_pass, settings.max_length
        numerics = TrainingConfig(dtype=settings.dtype)
        parts = {
            "weights": wide * count / self.ways,
            "activations": training_activations(self.student, rows, length, numerics),
        }
        each = rows * length * math.prod(self.sizes[name] for name in ("candidate", "data", "fsdp"))
        lower = ("evaluation.rows_per_pass", "mesh.fsdp")
        return Held("evaluation", "losses", parts, 2.0 * count * each, tokens / each, lower)
