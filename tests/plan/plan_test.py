"""TinyLlama-1.1B compiled by the TPU compiler for 16 chips that are not there."""

from functools import cache
from pathlib import Path

import pytest

from montessori_jax.cli import run
from montessori_jax.config_file import load_run_config
from montessori_jax.mesh import CANDIDATE
from montessori_jax.models.architecture import architecture
from montessori_jax.plan.analysis import Compiled, Found, compile_program
from montessori_jax.plan.plan import make_plan, programs_of
from montessori_jax.plan.products import products_of
from montessori_jax.plan.shapes import Planned, meshes
from montessori_jax.plan.stages import stages_of
from montessori_jax.plan.targets import parse_target
from tests.plan.libtpu import needs_libtpu

pytestmark = needs_libtpu
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "paper" / "tinyllama_1b.yaml"
TARGET = parse_target("v5e:4x4")
PARAMETERS = 1_100_048_384


@cache
def compiled(stage: str, name: str, *more: str) -> Compiled:
    """One program of TinyLlama as student and teacher, weights in 4 parts."""
    settings = [
        "mesh.fsdp=4", "teacher=hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0", "dpo.lora_rank=0",
        "influence.precision=bfloat16", "responses.max_tokens=256",
    ]  # fmt: skip
    config = load_run_config(CONFIG, [*settings, *more])
    planned = Planned(
        config,
        architecture(config.teacher),
        architecture(config.student),
        *meshes(config.mesh, TARGET),
    )
    [program] = [
        one
        for one in programs_of(planned, [x for x in stages_of(config).uses if x.group == stage])
        if one.name == name
    ]
    return compile_program(program, quick=True)


def sent(one: Compiled, kind: str, *axes: str, dtype: str | None = None) -> float:
    """Bytes that a chip sends."""
    return sum(
        talk.sent
        for talk in one.collectives
        if talk.kind == kind and talk.axes == axes and dtype in (None, talk.dtype)
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_training_step(stage: str):
    one = compiled(stage, "step")
    assert one.fits(TARGET.chip.memory)
    assert one.memory is not None
    # Weights and moments in float32, a quarter of them on a chip, written over by their successors.
    assert one.memory.arguments == pytest.approx(12 * PARAMETERS / 4, rel=0.01)
    assert one.memory.output < 2**20
    # Weights are gathered layer by layer, in bfloat16, at least in both directions (but for what
    # the layers do not hold), gradients scattered and summed over copies.
    layers = 2 * (PARAMETERS - 2 * 32000 * 2048) * 3 / 4
    assert sent(one, "all-gather", "fsdp", dtype="bf16") > 2 * layers
    assert sent(one, "all-gather", "fsdp", dtype="f32") < 0.05 * layers
    assert sent(one, "reduce-scatter", "fsdp") > layers
    assert sent(one, "all-reduce", "data") > layers / 4
    assert not any(CANDIDATE in talk.axes for talk in one.collectives)
    # Pairs share their prompt, which splash cannot keep apart: it is SFT's alone.
    assert (one.kernels > 0) == (stage == "sft")
    # Every layer is computed again; attention comes on top, embeddings are no product.
    assert 1.25 < one.products.flops / one.program.model_flops < 2


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["exact", "linearized"])
def test_candidates_have_nothing_to_say_to_each_other(method: str, precision: str):
    settings = [f"influence.method={method}", f"influence.precision={precision}"]
    one = compiled("influence", f"{method}: candidates", *settings)
    assert one.fits(TARGET.chip.memory)
    assert one.program.mesh.shape[CANDIDATE] == 4
    assert one.collectives
    assert {talk.axes for talk in one.collectives} == {("fsdp",)}
    assert (one.kernels > 0) == (method == "exact")  # forward mode needs the plain attention


def test_a_reference_gradient_is_summed_over_places_once():
    one = compiled("influence", "reference gradient", "influence.method=first_order")
    assert one.fits(TARGET.chip.memory)
    places = one.program.mesh.shape[CANDIDATE]
    across = [talk for talk in one.collectives if CANDIDATE in talk.axes]
    assert {(talk.kind, talk.axes) for talk in across} == {("all-reduce", (CANDIDATE,))}
    # A chip's quarter of the gradients, in float32, to and from the other places.
    once = 4 * PARAMETERS / 4 * 2 * (places - 1) / places
    assert sum(talk.sent for talk in across) == pytest.approx(once, rel=0.01)
    # 17 passes are dealt out to 4 places, 5 each: no other repetition (and every layer twice).
    assert one.products.flops / one.program.model_flops < 20 / 17 * 1.5


def test_programs_have_names_of_their_own():
    config = load_run_config(
        CONFIG, ["mesh.fsdp=4", "influence.method=exact", "influence.precision=bfloat16"]
    )
    both = architecture(config.student)
    planned = Planned(config, both, both, *meshes(config.mesh, TARGET))
    names = [(one.stage, one.name) for one in programs_of(planned, stages_of(config).uses)]
    assert ("influence", "audit in float32, exact: candidates") in names
    assert len(set(names)) == len(names)


def test_a_decode_step():
    one = compiled("generation", "responses: decode")
    assert one.fits(TARGET.chip.memory)
    assert one.kernels == 0
    assert one.program.read == pytest.approx(2 * PARAMETERS, rel=0.01)
    # Every chip writes texts of its own.
    assert sum(talk.sent for talk in one.collectives) < 2**20


def test_what_the_compiler_refuses_is_an_error_with_status_1(capsys):
    command = ["plan", str(CONFIG), "--target", "v5e:2x2", "--quick", "--stage", "evaluation"]
    assert run([*command, "evaluation.rows_per_pass=4096"]) == 1
    shown = capsys.readouterr()
    assert "DOES NOT FIT" in shown.out
    assert "evaluation, reference loss, needs" in shown.err
    assert "lower evaluation.rows_per_pass" in shown.err


@pytest.mark.parametrize(
    "settings",
    [
        ["signal=judge", "optimise=both", "judging.samples=3", "judging.temperature=1"],
        ["signal=training_loss", "optimise=bootstrap", "bootstrap.lora_rank=8"],
        ["signal=training_loss", "warmup.lora_rank=8"],
        ["method=llm2llm"],
        ["influence.method=auto", "influence.expansion_point=mean_update"],
        ["influence.method=second_order"],
        ["influence.precision=bfloat16", "influence.audit=8"],
        ["influence.method=less", "warmup.lora_rank=8"],
    ],
    ids=lambda settings: settings[0],
)
def test_every_program_of_every_method_can_be_traced(settings: list[str]):
    """From the stages' own functions, on shapes: an argument that is missing would be an error."""
    config = load_run_config(CONFIG, ["mesh.fsdp=4", "preferences.rule=extremes", *settings])
    planned = Planned(
        config,
        architecture(config.student),
        architecture(config.student),
        *meshes(config.mesh, parse_target("v5e:2x2")),
    )
    programs = programs_of(planned, stages_of(config).uses)
    groups = {name for one in programs for name in one.stage.split("+")}
    assert groups == {use.group for use in stages_of(config).uses}
    for one in programs:
        assert products_of(one.trace().jaxpr, one.trips).flops > 0
        assert sum(one.stages.values()) == pytest.approx(one.runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["first_order", "control_variate", "second_order", "grad_dot", "less"]
)
def test_other_estimators_say_nothing_to_each_other_either(method: str):
    one = compiled("influence", f"{method}: candidates", f"influence.method={method}")
    assert one.fits(TARGET.chip.memory)
    assert one.collectives
    assert not any(CANDIDATE in talk.axes for talk in one.collectives)


@pytest.mark.slow
def test_the_reference_gradient_crosses_candidate():
    """No candidate's program does; it is taken once for all of them (docs/scaling.md)."""
    one = compiled("influence", "reference gradient")
    assert one.fits(TARGET.chip.memory)
    assert any(CANDIDATE in talk.axes for talk in one.collectives)


@pytest.mark.slow
def test_the_largest_micro_batch_is_followed_by_one_that_does_not_fit():
    config = load_run_config(CONFIG, ["mesh.fsdp=4", "sft.micro_batch=4"])
    target = parse_target("v5e:2x2")
    plan = make_plan(config, target, stages=["sft"], search=True, quick=True)
    found = {one.setting: one for one in plan.largest}
    assert set(found) == {"sft.micro_batch", "sft.max_length"}
    rows = found["sft.micro_batch"]
    assert rows.value > 4
    assert rows.bytes <= target.chip.memory
    assert rows.too_large == rows.value + 1
    assert found["sft.max_length"].value > config.sft.max_length


@pytest.mark.slow
def test_the_largest_block_is_of_the_method_that_scores():
    """First order's candidates, not the definition's, which only audits: and both must fit."""
    config = load_run_config(CONFIG, ["mesh.fsdp=4", "influence.method=first_order"])
    known: dict[str, Found] = {}
    target = parse_target("v5e:2x2")
    plan = make_plan(config, target, stages=["influence"], search=True, quick=True, known=known)
    [block] = plan.largest
    assert block.setting == "influence.block"
    assert block.bytes <= target.chip.memory
    at_block = load_run_config(
        CONFIG, ["mesh.fsdp=4", "influence.method=first_order", f"influence.block={block.value}"]
    )
    again = make_plan(at_block, target, stages=["influence"], quick=True, known=known)
    candidates = [one for one in again.compiled if "candidates" in one.program.name]
    assert {one.program.name for one in candidates} >= {
        "first_order: candidates",
        "exact: candidates",
    }
    assert max(one.needed for one in candidates) == block.bytes


@pytest.mark.slow
def test_two_slices_sum_gradients_over_the_network_between_them():
    """A gradient over 8 copies: what crosses is a quarter (fsdp) of a quarter (data within a slice)
    of each gradient, in one direction and of two slices."""
    config = load_run_config(CONFIG, ["mesh.fsdp=4"])
    target = parse_target("v5e:4x4*2")
    plan = make_plan(config, target, stages=["sft"], quick=True)
    [one] = plan.compiled
    between = [talk for talk in one.collectives if talk.between_slices]
    assert {talk.axes for talk in between} == {("data",)}
    crossed = sum(talk.sent for talk in between)
    assert 2 * PARAMETERS / 16 < crossed < 1.1 * 4 * PARAMETERS / 16
