"""The programs of influence: the reference's, and one for candidates of each estimator."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from montessori_jax.config import InfluenceConfig
from montessori_jax.influence import (
    baselines,
    control_variate,
    exact,
    first_order,
    linearized,
    reference,
    second_order,
)
from montessori_jax.influence.blocks import stack_blocks
from montessori_jax.influence.chats import MeanLoss, TokenLosses, chat_candidate
from montessori_jax.influence.control_variate import SMALLEST_PART, part_of
from montessori_jax.influence.mesh import candidate_devices, reference_ways
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.regime import attention_of, resolved, with_method
from montessori_jax.influence.scoring import reference_for
from montessori_jax.mesh import CANDIDATE, DATA, FSDP, places_of
from montessori_jax.plan.programs import Program, chats_of
from montessori_jax.plan.shapes import (
    Planned,
    bytes_on_chip,
    everywhere,
    moments,
    placed,
    trained_model,
    weights,
)
from montessori_jax.plan.work import ASSUMED
from montessori_jax.pytrees import as_argument
from montessori_jax.training.optimizer import probe_optimizer

SMALLER = ("influence.block", "mesh.fsdp", "influence.rows_per_pass", "influence.max_length")


class _Probe:
    """Everything that influence programs take, by shape."""

    def __init__(self, planned: Planned, method: str, block: int):
        config, mesh = planned.config, planned.influence
        settings = with_method(resolved(config.influence), method)
        self.settings: InfluenceConfig = settings
        self.mesh = mesh
        self.model = trained_model(planned.student, config.warmup, mesh)
        self.tx = probe_optimizer(config.warmup, 5e-6)
        self.params = weights(self.model, mesh)
        self.opt_state = moments(self.tx, self.model, mesh)
        self.loss = MeanLoss(TokenLosses(self.model, settings.precision, attention_of(settings)))
        self.places = candidate_devices(mesh)
        self.block = self.places * block
        self.blocks = -(-settings.chunk // self.block)
        self.reference = self._reference(config.data.num_reference)
        self.batches = self.split(self.reference.batches)
        self.tokens = settings.max_length

    def _reference(self, count: int) -> Reference:
        """The set with its longest row as long as it may be."""
        longest = min(self.settings.max_length, self.settings.row_length or 10**9)
        chats = chats_of(count, ASSUMED.sample, ASSUMED.instruction, longest)
        return reference_for(self.model, chats, self.settings, reference_ways(self.mesh))

    def split(self, batches: Any) -> Any:
        """As `montessori_jax.influence.mesh.place_reference`: rows split within a place."""
        ways = reference_ways(self.mesh)

        def put(leaf: Any) -> Any:
            split = np.ndim(leaf) > 1 and np.shape(leaf)[1] % ways == 0
            spec = PartitionSpec(None, (DATA, FSDP)) if split else PartitionSpec()
            return placed(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(put, batches)

    def candidates(self, coarse: bool) -> tuple[Any, Any]:
        """Stacked candidates as long as they may be, and which blocks are filled."""
        [chat] = chats_of(1, self.tokens, ASSUMED.instruction)
        attention = attention_of(self.settings)
        one = chat_candidate("0", chat, self.tokens, coarse=coarse, attention=attention)
        data, filled = stack_blocks([one.data], self.block, self.blocks)
        return everywhere(data, self.mesh), everywhere(filled, self.mesh)

    @property
    def reference_rows(self) -> str:
        passes, rows, length = self.batches.tokens.shape
        return f"{passes} x {rows} reference rows of {length}"

    @property
    def reference_tokens(self) -> int:
        return int(np.prod(self.batches.tokens.shape))

    def program(
        self,
        method: str,
        trace: Callable[[], Any],
        candidates: float,
        each: float,
        against: str = "",
    ) -> Program:
        """An estimator's candidates: ``each`` costs so many FLOPs, and is held ``against`` that."""
        together = self.block * self.blocks
        about = f"{together} candidates of {self.tokens} tokens, {self.block} side by side"
        return Program(
            "influence",
            f"{method}: candidates",
            about + (f"; each against {against}" if against else ""),
            trace,
            self.mesh,
            runs=candidates / together,
            model_flops=together * each,
            lower=SMALLER,
        )


def estimator_program(planned: Planned, method: str, candidates: float) -> Program:
    """The program of one estimator's candidates, with the config's block or one where it chooses.

    Args:
        planned: settings, models and meshes.
        method: as ``influence.method`` has it, but for ``auto``.
        candidates: that an iteration scores by it.
    """
    block = planned.config.influence.block or 1
    if method == "linearized":
        return linearized_program(planned, candidates)
    if method in FEATURES:
        return baseline_program(planned, method, block, candidates)
    return BUILDERS[method](planned, block, candidates)


def gradient_program(planned: Planned, sets: float = 1.0) -> Program:
    """The reference gradient, added up batch by batch; so many times."""
    probe = _Probe(planned, "first_order", 1)
    smooth = as_argument(probe.reference.gradient_losses_of_batch or probe.loss.losses)

    def trace() -> Any:
        with jax.set_mesh(probe.mesh):
            return reference.gradient_program.trace(
                smooth,
                probe.params,
                probe.batches,
                everywhere(probe.reference.weights.astype(np.float32), probe.mesh),
                places=places_of(probe.params),
            )

    return Program(
        "influence",
        "reference gradient",
        f"the whole set: {probe.reference_rows}",
        trace,
        probe.mesh,
        runs=sets,
        model_flops=6 * probe.model.parameter_count() * probe.reference_tokens,
        # The optimizer's state, and the zero-gradient step's parameters.
        beside=bytes_on_chip((probe.opt_state, probe.params)),
        lower=SMALLER[1:],
    )


def exact_program(planned: Planned, block: int, candidates: float = 0.0) -> Program:
    """One optimizer step a candidate and the reference losses after it."""
    probe = _Probe(planned, "exact", block)

    def trace() -> Any:
        data, filled = probe.candidates(coarse=True)
        mode = np.zeros((probe.blocks, probe.block), np.int32)
        with jax.set_mesh(probe.mesh):
            return exact.probe_step.trace(
                as_argument(probe.loss),
                probe.tx,
                (as_argument(probe.reference.losses_of_batch),),
                probe.params,
                probe.opt_state,
                (probe.batches,),
                data,
                everywhere(mode, probe.mesh),
                filled,
                probe.settings.gradient_scale,
                probe.mesh,
            )

    parameters = probe.model.parameter_count()
    each = 6 * parameters * probe.tokens + 2 * parameters * probe.reference_tokens
    return probe.program("exact", trace, candidates, each, against=probe.reference_rows)


def first_order_program(planned: Planned, block: int, candidates: float = 0.0) -> Program:
    """One update a candidate, dotted with the reference gradient."""
    probe = _Probe(planned, "first_order", block)
    point = planned.config.influence.expansion_point

    def trace() -> Any:
        data, filled = probe.candidates(coarse=False)
        with jax.set_mesh(probe.mesh):
            return first_order.products.trace(
                as_argument(probe.loss),
                probe.tx,
                probe.params,
                probe.opt_state,
                (probe.params,),
                point,
                probe.params if point == "mean_update" else None,
                data,
                filled,
                probe.settings.gradient_scale,
                probe.mesh,
            )

    parameters = probe.model.parameter_count()
    return probe.program("first_order", trace, candidates, 6 * parameters * probe.tokens)


def linearized_program(planned: Planned, candidates: float = 0.0) -> Program:
    """Packed candidates through forward mode along one direction."""
    probe = _Probe(planned, "linearized", 1)
    chats = chats_of(probe.settings.chunk, ASSUMED.sample, ASSUMED.instruction, probe.tokens)
    made = [chat_candidate("0", chat, probe.tokens, coarse=True).data for chat in chats]
    packed, members = next(probe.loss.together(made, probe.places, reference_ways(probe.mesh)))

    def trace() -> Any:
        by_place = NamedSharding(probe.mesh, PartitionSpec(CANDIDATE))
        with jax.set_mesh(probe.mesh):
            return linearized.packed_slopes.trace(
                probe.loss, probe.params, (probe.params,), placed(packed, by_place), probe.mesh
            )

    parts, rows, length = packed.batch.tokens.shape
    return Program(
        "influence",
        "linearized: candidates",
        f"{parts} x {rows} rows of {length} with {len(members)} candidates",
        trace,
        probe.mesh,
        runs=candidates / len(members),
        model_flops=4 * probe.model.parameter_count() * parts * rows * length,
        # Moments stay; the offsets' constants need them no more, but nothing frees them.
        beside=bytes_on_chip(probe.opt_state),
        lower=("mesh.fsdp", "influence.max_length"),
    )


def control_variate_program(planned: Planned, block: int, candidates: float = 0.0) -> Program:
    """First order's products, and a part of the reference measured after the step."""
    probe = _Probe(planned, "control_variate", block)
    count = probe.reference.count
    size = max(SMALLEST_PART, math.ceil(probe.settings.control_fraction * count))
    part = probe.reference.part(part_of(count, min(size, count), 0).tolist())
    point = probe.settings.expansion_point

    def trace() -> Any:
        data, filled = probe.candidates(coarse=False)
        stepped = np.ones((probe.blocks, probe.block), bool)
        with jax.set_mesh(probe.mesh):
            return control_variate.corrected.trace(
                as_argument(probe.loss),
                probe.tx,
                (as_argument(part.losses_of_batch),),
                probe.params,
                probe.opt_state,
                probe.params,
                (probe.params,),
                (probe.split(part.batches),),
                point,
                probe.params if point == "mean_update" else None,
                data,
                everywhere(stepped, probe.mesh),
                filled,
                probe.settings.gradient_scale,
                probe.mesh,
            )

    parameters = probe.model.parameter_count()
    tokens = int(np.prod(part.batches.tokens.shape))
    return probe.program(
        "control_variate",
        trace,
        candidates,
        6 * parameters * (probe.tokens + tokens),
        against=f"{size} of {count} reference samples",
    )


def second_order_program(planned: Planned, block: int, candidates: float = 0.0) -> Program:
    """First order's products, and a Hessian-vector product of the reference a candidate."""
    probe = _Probe(planned, "second_order", block)
    point = probe.settings.expansion_point
    smooth = as_argument(probe.reference.gradient_losses_of_batch or probe.loss.losses)

    def trace() -> Any:
        data, filled = probe.candidates(coarse=True)
        with jax.set_mesh(probe.mesh):
            return second_order.curved.trace(
                as_argument(probe.loss),
                probe.tx,
                (smooth,),
                probe.params,
                probe.opt_state,
                probe.params,
                (probe.params,),
                (probe.batches,),
                (everywhere(probe.reference.weights.astype(np.float32), probe.mesh),),
                point,
                probe.params if point == "mean_update" else None,
                data,
                filled,
                probe.settings.gradient_scale,
                True,
                probe.mesh,
            )

    parameters = probe.model.parameter_count()
    each = 6 * parameters * probe.tokens + 10 * parameters * probe.reference_tokens
    return probe.program("second_order", trace, candidates, each, against=probe.reference_rows)


def baseline_program(planned: Planned, method: str, block: int, candidates: float = 0.0) -> Program:
    """A candidate's gradient, or LESS's feature of it, dotted with one direction."""
    probe = _Probe(planned, method, block)

    def trace() -> Any:
        data, filled = probe.candidates(coarse=False)
        with jax.set_mesh(probe.mesh):
            return baselines.aligned.trace(
                as_argument(probe.loss),
                probe.tx,
                probe.params,
                probe.opt_state,
                (probe.params,),
                FEATURES[method],
                data,
                filled,
                probe.settings.gradient_scale,
                probe.mesh,
            )

    parameters = probe.model.parameter_count()
    return probe.program(method, trace, candidates, 6 * parameters * probe.tokens)


BUILDERS: dict[str, Callable[[Planned, int, float], Program]] = {
    "exact": exact_program,
    "first_order": first_order_program,
    "control_variate": control_variate_program,
    "second_order": second_order_program,
}
FEATURES: dict[str, baselines.Feature] = {
    "grad_dot": "gradient",
    "grad_cos": "gradient",
    "less": "adam",
}
