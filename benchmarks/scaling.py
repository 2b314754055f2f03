"""How communication grows with the chips: SFT and influence compiled for 4 to 256 TPU v5e.

    python -m benchmarks.scaling                    # 16 programs, minutes of compiling
    python -m benchmarks.scaling --chips 4 16

Weak scaling: rows and candidates a chip stay what they are, and so does the number of chips that
share one copy of the weights. Everything is read from compiled programs and published speeds;
nothing runs. The compiler always tries less hard here, as ``montessori plan --quick`` has it:
memory is a few percent off. Needs montessori-jax[tpu-plan]. Writes
``benchmarks/results/scaling.json`` and prints the table of docs/scaling.md.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.record import ROOT, write_result
from montessori_jax.config_file import load_run_config
from montessori_jax.models.architecture import architecture
from montessori_jax.plan.analysis import compile_program
from montessori_jax.plan.estimate import MFU, seconds_of
from montessori_jax.plan.influence_programs import (
    exact_program,
    gradient_program,
    linearized_program,
)
from montessori_jax.plan.programs import Program, sft_program
from montessori_jax.plan.shapes import Planned, meshes
from montessori_jax.plan.targets import GIB, parse_target

TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
SHARE = 4  # chips that share one copy of the student
ROWS = 2  # rows of SFT on a chip


def programs(chips: int) -> Iterator[Program]:
    """SFT, exact and linearized influence of TinyLlama-1.1B on so many chips, and the reference
    gradient, which is taken once for all candidates."""
    config = load_run_config(
        ROOT / "configs" / "paper" / "tinyllama_1b.yaml",
        [
            f"mesh.fsdp={SHARE}",
            f"sft.micro_batch={ROWS}",
            f"sft.batch_size={ROWS * chips}",
            f"influence.chunk={chips // SHARE * 4}",
            "influence.precision=bfloat16",
        ],
    )
    planned = Planned(
        config,
        architecture(config.teacher),
        architecture(config.student),
        *meshes(config.mesh, parse_target(TOPOLOGIES[chips])),
    )
    yield sft_program(planned, "sft", 1.0)
    yield exact_program(planned, 1)
    yield linearized_program(planned)
    yield gradient_program(planned)


def measured(program: Program, chips: int) -> dict[str, Any]:
    """One row: bytes a chip sends by axis, and the time of arithmetic and links."""
    target = parse_target(TOPOLOGIES[chips])
    one = compile_program(program, quick=True)
    took = seconds_of(one.products.unit, 0.0, one.collectives, target.chip, chips, MFU)
    by_axes: dict[str, float] = {}
    for talk in one.collectives:
        axes = "+".join(talk.axes)
        by_axes[axes] = by_axes.get(axes, 0.0) + talk.sent
    return {
        "program": f"{program.stage}, {program.name}",
        "unit": program.unit,
        "chips": chips,
        "bytes_sent_by_a_chip": by_axes,
        "collectives": [asdict(talk) for talk in one.collectives],
        "flops_a_chip": one.products.unit / chips,
        "xla_flops_a_chip_loops_once": one.xla_flops,
        "arithmetic_seconds": took.arithmetic,
        "link_seconds": took.links,
        "bytes_a_chip": one.needed,
        "compile_seconds": round(one.seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a row a program and number of chips."""
    yield (
        "| program | chips | memory a chip | TFLOPs a chip | XLA's count | sent by a chip, by axis "
        f"| arithmetic at {MFU:.0%} | links |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["program"], row["chips"])):
        sent = ", ".join(
            f"{axes} {count / GIB:.2f} GiB"
            for axes, count in sorted(row["bytes_sent_by_a_chip"].items(), key=lambda x: -x[1])
            if count > GIB / 200
        )
        yield (
            f"| {row['program']} | {row['chips']} | {row['bytes_a_chip'] / GIB:.2f} GiB | "
            f"{row['flops_a_chip'] / 1e12:.1f} | "
            f"{row['xla_flops_a_chip_loops_once'] / 1e12:.2f} | {sent or 'nothing'} | "
            f"{row['arithmetic_seconds']:.2f} s | {row['link_seconds']:.3f} s |"
        )


def main() -> None:
    """Compile, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", type=int, nargs="+", choices=TOPOLOGIES, default=[*TOPOLOGIES])
    parsed = parser.parse_args()
    rows = []
    for chips in parsed.chips:
        for program in programs(chips):
            rows.append(measured(program, chips))
            print(f"{rows[-1]['program']} on {chips}: {rows[-1]['compile_seconds']} s", flush=True)
            write_result("scaling", {"mfu": MFU, "quick": True, "rows": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
