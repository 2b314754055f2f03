"""A plan as lines for people, as Markdown and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from montessori_jax.plan.analysis import Compiled
from montessori_jax.plan.analytic import Held
from montessori_jax.plan.estimate import MFU, READING, Seconds, seconds_of
from montessori_jax.plan.plan import Plan
from montessori_jax.plan.targets import GIB
from montessori_jax.plan.work import ASSUMED

FEW = 6  # kinds of collectives shown; all are in the JSON


def heading(plan: Plan) -> Iterator[str]:
    """What is planned, and what all figures assume."""
    chip, target = plan.target.chip, plan.target
    yield (
        f"{target.name}: {target.chips} x {chip.kind}, {chip.memory / GIB:.2f} GiB and "
        f"{chip.flops / 1e12:.0f} TFLOP/s (bfloat16) each; {chip.source}"
    )
    for use, shape in plan.shapes.items():
        axes = " x ".join(f"{name} {size}" for name, size in shape.items() if size > 1)
        yield f"mesh of {use}: {axes or 'one chip'}"
    if target.slices > 1:
        speed = f"{chip.network / 1e9:.3g} GB/s a chip, published" if chip.network else "not known"
        yield f"{target.slices} slices; the network between them: {speed}"


def about(one: Compiled, plan: Plan, mfu: float) -> Iterator[str]:
    """Everything of one compiled program."""
    chip, program = plan.target.chip, one.program
    yield f"{program.stage}, {program.name}: {program.unit}"
    yield f"  memory       {_memory(one, chip.memory)}"
    yield (
        f"  arithmetic   {one.products.flops:.3g} FLOPs in the traced program on all chips "
        f"(x{one.products.flops / max(program.model_flops, 1):.2f} the analytic "
        f"{program.model_flops:.3g}), {one.products.unit:.3g} as bfloat16 units count; XLA counts "
        f"{one.xla_flops:.3g} a chip, each loop's body once"
    )
    shown = [
        talk
        for index, talk in enumerate(one.collectives)
        if index < FEW or (talk.between_slices and talk.sent > one.collectives[0].sent / 100)
    ]
    for index, talk in enumerate(shown):
        label = "collectives" if index == 0 else ""
        yield (
            f"  {label:12} {talk.count} {talk.kind} over {'+'.join(talk.axes)}, {talk.dtype}: "
            f"{_bytes(talk.sent)} sent by a chip{' between slices' if talk.between_slices else ''}"
        )
    if not one.collectives and one.memory is not None:
        yield "  collectives  none"
    took = seconds(one, plan, mfu)
    bound = f"{took.arithmetic:.3g} s of arithmetic"
    if program.read:
        bound += f" or {took.reading:.3g} s of reading weights"
    if took.network is None:
        bound += ", an unknown time between slices (left out)"
    elif took.network:
        bound += f", {took.network:.3g} s between slices"
    yield f"  time         {bound}, {took.links:.3g} s of links; {_runs(program.runs)}"
    if program.stages:
        yield f"  run by       {', '.join(program.stages)}"
    kernels = f"{one.kernels} Pallas kernels; " if one.kernels else ""
    yield f"  compiled     {kernels}in {one.seconds:.0f} s on this host"


def seconds(one: Compiled, plan: Plan, mfu: float) -> Seconds:
    """Of one run of a compiled program."""
    return seconds_of(
        one.products.unit, one.program.read, one.collectives, plan.target.chip,
        one.program.mesh.size, mfu,
    )  # fmt: skip


def hours(plan: Plan, mfu: float) -> dict[str, float]:
    """Of an iteration of the loop, by its stages; what does not fit (`left_out`) is not in it."""
    found: dict[str, float] = {}
    limit = plan.target.chip.memory
    for one in plan.compiled:
        if one.fits(limit):
            took = seconds(one, plan, mfu).total / 3600
            for stage, runs in (
                one.program.stages or {one.program.stage: one.program.runs}
            ).items():
                found[stage] = found.get(stage, 0.0) + took * runs
    for held in plan.counted:
        if held.total > limit:
            continue
        took = counted_seconds(held, plan, mfu).total / 3600
        for stage, runs in held.stages.items():
            found[stage] = found.get(stage, 0.0) + took * runs
    return found


def left_out(plan: Plan) -> list[str]:
    """What `hours` does not have in it, since it does not fit."""
    limit = plan.target.chip.memory
    return [
        *(f"{one.program.stage} ({one.program.name})"
          for one in plan.compiled if not one.fits(limit)),
        *(f"{held.stage} ({held.name})" for held in plan.counted if held.total > limit),
    ]  # fmt: skip


def counted_seconds(held: Held, plan: Plan, mfu: float) -> Seconds:
    """Of one run of what was counted: no communication is in it."""
    return seconds_of(held.flops, held.read, (), plan.target.chip, plan.target.chips, mfu)


def ending(plan: Plan, mfu: float, price: float | None) -> Iterator[str]:
    """Largest settings, time, cost, and what does not fit."""
    limit = plan.target.chip.memory
    for held in plan.counted:
        parts = ", ".join(f"{name} {_bytes(count)}" for name, count in held.parts.items())
        verdict = "fits" if held.total <= limit else "DOES NOT FIT"
        yield (
            f"{held.stage}, {held.name} (counted, not compiled): {_bytes(held.total)} of "
            f"{_bytes(limit)} a chip, {verdict}: {parts}"
        )
        took = counted_seconds(held, plan, mfu)
        bound = f"{took.arithmetic:.3g} s of arithmetic"
        if held.read:
            bound += f" or {took.reading:.3g} s of reading weights"
        yield f"  {held.flops:.3g} FLOPs on all chips, {bound}; {_runs(held.runs)}"
        yield f"  run by {', '.join(held.stages)}"
    for one in plan.largest:
        refused = one.too_large
        more = f"{refused} does not" if refused else "nothing that does not was met"
        more = "more would change nothing" if one.enough else more
        yield f"largest {one.setting} that fits: {one.value} ({_bytes(one.bytes)} a chip); {more}"
    for reason, stages in unplanned(plan).items():
        yield f"not planned: {', '.join(stages)}: {reason}"
    by_stage = hours(plan, mfu)
    if by_stage:
        total = sum(by_stage.values())
        each = ", ".join(f"{stage} {value:.2f}" for stage, value in by_stage.items())
        missing = "; ".join(left_out(plan))
        without = f", without what does not fit: {missing}" if missing else ""
        yield f"time of an iteration: about {total:.2f} hours ({each}){without}"
        yield (
            f"  {'by counting alone, without communication; ' if plan.counted else ''}assumed: "
            f"{mfu:.0%} of the published FLOP/s, {READING:.0%} of the memory's "
            "bandwidth while decoding, links and networks at full speed, nothing overlaps; prompts "
            f"of {ASSUMED.prompt} tokens, instructions of {ASSUMED.instruction}, responses of "
            f"{ASSUMED.response}, rows full; half of the candidates help. Nothing is measured."
        )
        exact = plan.config.influence.precision == "float32"
        if exact and any(held.stage == "influence" for held in plan.counted):
            yield (
                "  influence in float32 is counted at the bfloat16 speed: a GPU takes several "
                "times that for such products"
            )
        if price is not None:
            cost = total * plan.target.chips * price
            yield f"cost of an iteration: about ${cost:,.2f} at ${price:.2f} a chip-hour (given)"
    for large in plan.too_large():
        yield f"DOES NOT FIT: {mend(large, limit, plan.target.chips > 1)}"


def unplanned(plan: Plan) -> dict[str, list[str]]:
    """Stages without a program here, by the reason."""
    found: dict[str, list[str]] = {}
    for stage, reason in plan.stages.unplanned if plan.stages else ():
        found.setdefault(reason, []).append(stage)
    return found


def mend(one: Compiled | Held, limit: float, many: bool = True) -> str:
    """One line: what is too large, by how much, and which setting to change.

    ``many`` is whether there are chips to split weights over.
    """
    if isinstance(one, Compiled):
        stage, name, lower = one.program.stage, one.program.name, one.program.lower
        needed = one.needed
    else:
        stage, name, lower, needed = one.stage, one.name, one.lower, int(one.total)
    first, *rest = lower if many else [name for name in lower if not name.startswith("mesh.")]
    verb = (
        "set"
        if "=" in first
        else "raise"
        if first.startswith(("mesh.", "warmup.lora"))
        else ("raise" if first.endswith("lora_rank") else "lower")
    )
    more = f" (or {', '.join(rest)})" if rest else ""
    size = f"{_bytes(needed)}" if needed else "more"
    return f"{stage}, {name}, needs {size} of {_bytes(limit)} a chip: {verb} {first}{more}"


def as_json(plan: Plan, mfu: float, price: float | None) -> dict[str, Any]:
    """All of it: bytes, FLOPs, seconds."""
    from montessori_jax.config import as_dict

    limit = plan.target.chip.memory
    programs = []
    for one in plan.compiled:
        program = one.program
        programs.append(
            {
                "stage": program.stage,
                "program": program.name,
                "unit": program.unit,
                "fits": one.fits(limit),
                "bytes_needed": one.needed,
                "memory": asdict(one.memory) if one.memory else None,
                "flops": {
                    "traced": one.products.flops,
                    "matrix_unit": one.products.unit,
                    "analytic": program.model_flops,
                    "xla_a_chip_loops_once": one.xla_flops,
                },
                "collectives": [asdict(talk) for talk in one.collectives],
                "pallas_kernels": one.kernels,
                "seconds": asdict(seconds(one, plan, mfu)),
                "runs": program.runs,
                "stages": program.stages,
                "compile_seconds": round(one.seconds, 1),
                "settings_to_change": program.lower,
            }
        )
    return {
        "target": asdict(plan.target) | {"flops_a_chip": plan.target.chip.flops},
        "meshes": plan.shapes,
        "programs": programs,
        "counted": [
            asdict(held)
            | {"bytes": held.total, "seconds": asdict(counted_seconds(held, plan, mfu))}
            for held in plan.counted
        ],
        "not_planned": unplanned(plan),
        "largest": [asdict(one) for one in plan.largest],
        "hours": hours(plan, mfu),
        "assumed": {"mfu": mfu, "reading": READING, **asdict(ASSUMED)},
        "price_a_chip_hour": price,
        "fits": not plan.too_large(),
        "config": as_dict(plan.config),
    }


def _memory(one: Compiled, limit: float) -> str:
    verdict = "fits" if one.fits(limit) else "DOES NOT FIT"
    if one.memory is None:
        return f"{_bytes(one.needed)} of {_bytes(limit)} a chip, {verdict}"
    held = one.memory
    parts = [
        ("arguments", held.arguments), ("temporaries", held.temporaries), ("output", held.output),
        ("code", held.code), ("beside", held.beside),
    ]  # fmt: skip
    listed = ", ".join(f"{name} {_bytes(count)}" for name, count in parts if count)
    return f"{_bytes(held.total)} of {_bytes(limit)} a chip, {verdict}: {listed}"


def _runs(runs: float) -> str:
    return (
        f"{runs:,.0f} in an iteration"
        if runs
        else "run only where the audit of a cheaper one fails"
    )


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.3g} MiB"


__all__ = ["MFU", "about", "as_json", "ending", "heading", "hours", "mend"]
