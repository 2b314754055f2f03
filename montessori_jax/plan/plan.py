"""A config on a target: every stage's programs compiled, and the largest settings that fit."""

import math
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field, replace

from montessori_jax.config import RunConfig
from montessori_jax.errors import UserError
from montessori_jax.influence.mesh import candidate_devices
from montessori_jax.mesh import ROWS, row_ways
from montessori_jax.models import ModelConfig
from montessori_jax.models.architecture import architecture
from montessori_jax.plan.analysis import Compiled, Found, compile_program
from montessori_jax.plan.analytic import Held, counting, held
from montessori_jax.plan.generation_programs import generation_programs
from montessori_jax.plan.influence_programs import estimator_program, gradient_program
from montessori_jax.plan.largest import find_largest
from montessori_jax.plan.programs import Program, dpo_programs, evaluation_program, sft_program
from montessori_jax.plan.search import Largest
from montessori_jax.plan.shapes import Planned, meshes
from montessori_jax.plan.stages import (
    AUDIT,
    GROUPS,
    Recipe,
    Stages,
    Use,
    gathered,
    groups_of,
    stages_of,
)
from montessori_jax.plan.targets import Target


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        config: the settings.
        target: the chips.
        stages: what an iteration does, of the stages that were asked for.
        compiled: each program, in the order of the loop; none for GPUs.
        counted: bytes by counting alone, for GPUs.
        largest: settings that were searched for.
        shapes: sizes of the meshes, by use.
    """

    config: RunConfig
    target: Target
    stages: Stages | None = None
    compiled: tuple[Compiled, ...] = ()
    counted: tuple[Held, ...] = ()
    largest: tuple[Largest, ...] = field(default=())
    shapes: dict[str, dict[str, int]] = field(default_factory=dict)

    def too_large(self) -> list[Compiled | Held]:
        """What an iteration of the loop runs and does not fit."""
        limit = self.target.chip.memory
        compiled = [one for one in self.compiled if one.program.runs and not one.fits(limit)]
        return [*compiled, *(one for one in self.counted if one.runs and one.total > limit)]


def make_plan(
    config: RunConfig,
    target: Target,
    *,
    stages: Iterable[str] = GROUPS,
    search: bool = False,
    quick: bool = False,
    told: Callable[[Compiled], None] = lambda one: None,
    known: MutableMapping[str, Found] | None = None,
) -> Plan:
    """Compile every program of the config's stages for ``target``; for GPUs count what they hold.

    Args:
        config: the settings.
        target: of `parse_target`.
        stages: of `GROUPS`, which ones.
        search: also look for the largest micro-batches, block and length, a few more programs each.
        quick: see `compile_program`.
        told: given each program as it is compiled.
        known: what was found of programs before, by `compile_program`.

    Raises:
        UserError: the mesh does not divide the target or a model, or a stage is not known.
    """
    wanted = list(stages)
    for stage in wanted:
        if stage not in GROUPS:
            raise UserError(f"stage '{stage}' is not known; choose {', '.join(GROUPS)}")
    found = stages_of(config)
    found.uses = [use for use in found.uses if use.group in wanted]
    if set(wanted) != set(GROUPS):
        planned_groups = {use.group for use in found.uses}
        missing = [stage for stage in wanted if stage not in planned_groups]
        found.skip("this config has no program of it", *missing)
    student = architecture(config.student)
    # A teacher behind an address has no shapes here, and no program.
    teacher = architecture(config.teacher) if found.teacher_needed else student
    if target.topology is None:
        return _counted(config, found, teacher, student, target, search)
    planned = Planned(config, teacher, student, *meshes(config.mesh, target))
    writing = "generation" if planned.hosts == 1 else "generation, of each host"
    shapes = {
        "training": dict(planned.training.shape),
        "influence": dict(planned.influence.shape),
        writing: dict(planned.sampling.shape),
    }
    compiled = []
    for program in programs_of(planned, found.uses):
        compiled.append(compile_program(program, quick=quick, known=known))
        told(compiled[-1])
    plan = Plan(config, target, found, tuple(compiled), shapes=shapes)
    if not search:
        return plan
    return replace(plan, largest=tuple(_largest(planned, plan, quick, known)))


def _counted(
    config: RunConfig,
    found: Stages,
    teacher: ModelConfig,
    student: ModelConfig,
    target: Target,
    search: bool,
) -> Plan:
    """The plan of GPUs."""
    by_count = counting(config, teacher, student, target)
    plan = Plan(config, target, found, counted=tuple(held(found, by_count)))
    if not search:
        return plan

    def needed(config: RunConfig, recipe: Recipe) -> float:
        return replace(by_count, config=config).of(recipe, 1.0).total

    ways = math.prod(by_count.sizes[name] for name in ROWS)
    places = target.chips // (by_count.ways * max(1, config.mesh.data))
    limit = target.chip.memory
    found_largest = find_largest(config, found.uses, needed, limit, ways=ways, places=places)
    return replace(plan, largest=tuple(found_largest))


def programs_of(planned: Planned, uses: Iterable[Use]) -> list[Program]:
    """The programs of some stages, each once, in the order of the loop."""
    found = []
    for shared in gathered(planned.config, uses):
        amount = sum(use.amount for use in shared)
        by_stage: dict[str, float] = {}
        for use in shared:
            by_stage[use.stage] = by_stage.get(use.stage, 0.0) + use.amount
        for program in _build(planned, shared[0].recipe, amount):
            runs = {name: program.runs * part / (amount or 1) for name, part in by_stage.items()}
            found.append(replace(program, stage=groups_of(shared), stages=runs))
    return found


def _build(planned: Planned, recipe: Recipe, amount: float) -> list[Program]:
    """The programs of a recipe, for an amount as `Use` has it."""
    kind, section, samples = recipe
    if kind == "write":
        return generation_programs(planned, section, samples, amount)
    if kind == "train":
        return [sft_program(planned, section, amount)]
    if kind == "dpo":
        return dpo_programs(planned, amount)
    if kind == "gradient":
        return [gradient_program(planned, amount)]
    if kind == "score":
        return [estimator_program(planned, section, amount)]
    if kind == "audit":
        true = replace(planned.config.influence, preset="corrected", precision="float32")
        true_config = replace(planned.config, influence=true)
        program = estimator_program(planned._replace(config=true_config), section, amount)
        return [replace(program, name=f"{AUDIT}, {program.name}")]
    return [evaluation_program(planned, amount, warm=section == "warmup")]


def _largest(
    planned: Planned, plan: Plan, quick: bool, known: MutableMapping[str, Found] | None
) -> Iterable[Largest]:
    """By the compiler; a program that it refuses without a number needs infinitely much."""
    limit = plan.target.chip.memory

    def needed(config: RunConfig, recipe: Recipe) -> float:
        # Of DPO the step, which holds more than the reference's log-probs.
        program = _build(planned._replace(config=config), recipe, 1.0)[-1]
        one = compile_program(program, quick=quick, known=known)
        return one.needed if one.memory is not None or one.needed > limit else math.inf

    uses = plan.stages.uses if plan.stages else ()
    ways, places = row_ways(planned.training), candidate_devices(planned.influence)
    return find_largest(plan.config, uses, needed, limit, ways=ways, places=places)
