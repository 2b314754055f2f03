"""Targets by name, what counting says of them, and errors in one line."""

from dataclasses import replace
from pathlib import Path

import pytest

from montessori_jax.cli import run
from montessori_jax.config_file import load_run_config
from montessori_jax.costs import PEAK_FLOPS
from montessori_jax.errors import UserError
from montessori_jax.plan import topology
from montessori_jax.plan.estimate import seconds_of
from montessori_jax.plan.hlo import Collective
from montessori_jax.plan.plan import make_plan
from montessori_jax.plan.report import ending, hours
from montessori_jax.plan.targets import FORMS, GPUS, TPUS, parse_target
from montessori_jax.plan.work import ASSUMED

PAPER = Path(__file__).resolve().parents[2] / "configs" / "paper"
LLAMA, TINY = str(PAPER / "llama3_8b.yaml"), str(PAPER / "tinyllama_1b.yaml")
FULL = ["sft.lora_rank=0", "warmup.lora_rank=0", "dpo.lora_rank=0"]


@pytest.mark.parametrize(
    ("name", "chips", "slices"),
    [("v5e:4x4", 16, 1), ("v5p:2x2x1", 4, 1), ("v5e:4x4*2", 32, 2), ("h100:8", 8, 1)],
)
def test_targets(name: str, chips: int, slices: int):
    target = parse_target(name)
    assert (target.chips, target.slices) == (chips, slices)
    assert (target.topology is None) == name.startswith("h100")


@pytest.mark.parametrize("name", [*GPUS, *TPUS])
def test_every_advertised_chip_has_its_published_figures(name: str):
    shape = {"v5p": "2x2x1"}.get(name, "4x4") if name in TPUS else "1"
    chip = parse_target(f"{name}:{shape}").chip
    assert chip.flops == PEAK_FLOPS[chip.kind] > 1e14
    assert min(chip.memory, chip.bandwidth, chip.links) > 0
    assert name in FORMS


def test_every_gpu_of_the_help_can_be_planned_for(capsys):
    for name in GPUS:
        assert run(["plan", TINY, "--target", f"{name}:1"]) in (0, 1)
        assert f"1 x {GPUS[name].kind}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:4x4*", "v5p:4x4", "h100", "h100:0", "b300:1"]
)
def test_unknown_targets_are_refused_with_those_that_are_known(name: str):
    with pytest.raises(UserError, match=r"target .* is not known; give v5e:4x4"):
        parse_target(name)


def stages_that_do_not_fit(target: str, *overrides: str) -> set[str]:
    plan = make_plan(load_run_config(LLAMA, [*overrides]), parse_target(target))
    return {name for one in plan.too_large() for name in one.stage.split("+")}


def test_an_8b_model_trains_on_one_card_by_adapters_alone_or_with_141_gb_or_sharded():
    assert stages_that_do_not_fit("h100:1") == set()
    assert stages_that_do_not_fit("h100:1", "sft.lora_rank=0") == {"sft"}
    assert stages_that_do_not_fit("h200:1", "sft.lora_rank=0") == set()
    assert stages_that_do_not_fit("h100:8", *FULL) == {"warmup", "sft", "dpo", "influence"}
    assert stages_that_do_not_fit("h100:8", *FULL, "mesh.fsdp=8") == set()


def test_what_does_not_fit_is_an_error_that_names_the_setting(capsys, tmp_path):
    file = tmp_path / "plan.json"
    command = ["plan", LLAMA, "--target", "h100:8", "sft.lora_rank=0", "--json", str(file)]
    assert run(command) == 1
    shown = capsys.readouterr()
    assert "counted, not compiled" in shown.out
    assert "sft, step, needs 12" in shown.err
    assert "raise mesh.fsdp" in shown.err
    assert shown.err.count("\n") == 1
    assert '"fits": false' in file.read_text()
    assert run(["plan", LLAMA, "--target", "h100:1"]) == 0
    assert run(["plan", LLAMA, "--target", "h100:1", "sft.lora_rank=0"]) == 1
    assert "raise sft.lora_rank" in capsys.readouterr().err  # one card has nothing to split over


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'montessori-jax\[tpu-plan\]'"):
        make_plan(load_run_config(TINY), parse_target("v5e:4x4"))


def test_llama_3_8b_trains_in_full_on_no_card_of_80_gb_and_with_adapters_on_one():
    """16 bytes a parameter: 128.5 GB; in bfloat16 with adapters 18.7 GB."""

    def step(*overrides: str):
        config = load_run_config(LLAMA, [*overrides])
        [one] = make_plan(config, parse_target("h100:1"), stages=["sft"]).counted
        return one

    assert step("sft.lora_rank=0").total > 16 * 8_030_261_248 > 80e9
    assert step().total < 25e9


def test_influence_of_all_weights_of_an_8b_model_does_not_fit_on_141_gb():
    """Parameters, two moments, the reference's gradient, and a candidate's three copies: 28 bytes
    a parameter, 225 GB."""
    config = load_run_config(LLAMA, ["warmup.lora_rank=0"])
    plan = make_plan(config, parse_target("h200:1"))
    [candidate] = [one for one in plan.counted if one.name == "first_order: a candidate"]
    assert candidate.total - candidate.parts["activations"] == 28 * 8_030_261_248
    assert {one.stage for one in plan.too_large()} == {"influence"}
    assert "DOES NOT FIT: influence, first_order" in "\n".join(ending(plan, 0.3, None))
    by_chip = load_run_config(LLAMA, ["warmup.lora_rank=0", "mesh.fsdp=8"])
    assert make_plan(by_chip, parse_target("h200:8")).too_large() == []


def test_cards_write_rows_of_their_own_and_share_keys_by_tensor():
    def kept(*overrides: str, target: str = "h100:8"):
        config = load_run_config(LLAMA, [*overrides])
        plan = make_plan(config, parse_target(target), stages=["generation"])
        return [(one.parts["keys and values"], one.parts["logits"]) for one in plan.counted]

    alone = kept(target="h100:1")
    assert kept() == [(keys / 8, logits / 8) for keys, logits in alone]
    assert kept("mesh.tensor=4") == [(keys / 8, logits / 2) for keys, logits in alone]


def test_what_does_not_fit_is_not_in_the_time_and_is_said():
    plan = make_plan(load_run_config(LLAMA, ["warmup.lora_rank=0"]), parse_target("h200:1"))
    [line] = [one for one in ending(plan, 0.3, None) if one.startswith("time of an iteration")]
    assert "without what does not fit: influence (first_order: a candidate)" in line
    [loses] = [one for one in plan.counted if one.name == "first_order: a candidate"]
    rest = replace(plan, counted=[one for one in plan.counted if one is not loses])
    assert hours(plan, 0.3) == hours(rest, 0.3)


def test_time_and_cost_of_gpus_by_counting(capsys):
    """An evaluation pass: 2 N a token at 30% of 989 TFLOP/s; the price is hours times dollars."""
    config = load_run_config(LLAMA)
    plan = make_plan(config, parse_target("h100:1"))
    [loss] = [one for one in plan.counted if one.stage == "evaluation"]
    assert loss.flops == 2 * 8_030_261_248 * config.evaluation.rows_per_pass * 1024
    took = hours(plan, 0.3)
    passes = config.data.num_heldout * ASSUMED.sample / (config.evaluation.rows_per_pass * 1024)
    assert took["evaluate-tuned"] * 3600 == pytest.approx(passes * loss.flops / 0.3 / 989e12)
    assert run(["plan", LLAMA, "--target", "h100:1", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"about {sum(took.values()):.2f} hours" in shown
    assert f"about ${2 * sum(took.values()):,.2f} at $2.00 a chip-hour (given)" in shown
    assert "by counting alone, without communication" in shown


def test_twice_the_cards_take_half_the_time_where_nothing_is_read():
    took = [
        hours(make_plan(load_run_config(LLAMA), parse_target(name)), 0.3)["dpo"]
        for name in ("h100:4", "h100:8")
    ]
    assert took[0] == pytest.approx(2 * took[1])


def test_other_methods_have_their_own_stages(capsys):
    config = PAPER / "main/llama3_8b/self_reward_1.yaml"
    assert run(["plan", str(config), "--target", "h100:1"]) == 0
    shown = capsys.readouterr().out
    assert "run by judge" in shown
    assert "influence" not in shown
    for name in ("no_finetuning", "self_instruct_gpt4o", "llm2llm_1"):
        run(["plan", str(PAPER / f"main/llama3_8b/{name}.yaml"), "--target", "h100:1"])
    shown = capsys.readouterr().out
    assert "not planned: synthesise-untuned" in shown
    assert "written behind https://api.openai.com/v1" in shown


def test_a_stage_that_the_config_does_not_run_is_said(capsys):
    config = str(PAPER / "main/llama3_8b/no_finetuning.yaml")
    assert run(["plan", config, "--target", "h100:1", "--stage", "dpo"]) == 0
    assert "not planned: dpo: this config has no program of it" in capsys.readouterr().out


def test_bytes_between_slices_are_not_charged_at_the_links_speed():
    """10 GB within a slice at 200 GB/s, 1 GB between slices at 25 Gbit/s."""
    talk = (
        Collective("all-gather", ("fsdp",), "bf16", 1, 10e9),
        Collective("all-reduce", ("data",), "f32", 1, 1e9, between_slices=True),
    )
    took = seconds_of(0.0, 0.0, talk, TPUS["v5e"], 32, 0.3)
    assert (took.links, took.network) == (pytest.approx(0.05), pytest.approx(0.32))
    assert took.total == pytest.approx(0.37)
    unknown = seconds_of(0.0, 0.0, talk, replace(TPUS["v5e"], network=0.0), 32, 0.3)
    assert unknown.network is None
    assert unknown.total == pytest.approx(0.05)
