"""What is planned of a config is what its method runs: stage names by the methods' own code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from montessori_jax.config import RunConfig
from montessori_jax.config_file import load_run_config
from montessori_jax.methods import METHODS, teaching
from montessori_jax.plan import stages
from montessori_jax.plan.stages import Use, gathered, stages_of

PAPER = Path(__file__).resolve().parents[2] / "configs" / "paper"
CONFIGS = {path.relative_to(PAPER).as_posix(): path for path in sorted(PAPER.rglob("*.yaml"))}
VARIANTS = [
    ["method=montessori", "signal=judge", "optimise=both", "preferences.rule=extremes"],
    ["signal=random", "optimise=response", "preferences.rule=extremes"],
    ["signal=training_loss", "optimise=bootstrap", "preferences.rule=extremes"],
    ["influence.method=auto", "compare_self_instruct=false"],
]


class Recorded:
    """A loop that notes the names of its stages and runs none."""

    def __init__(self, config: RunConfig):
        self.config, self.iteration, self.teacher, self.back_end = config, 1, "teacher", "jax"
        self.teachers = None
        self.names: list[str] = []

    def stage(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.names.append(name)
        return {"rows": 8}

    def folder(self, stage: str, iteration: int | None = None) -> str:
        return stage

    states = folder


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(teaching, "count_rows", lambda place: 8)


def run_by(config: RunConfig) -> list[str]:
    loop: Any = Recorded(config)
    METHODS[config.method].iterate(loop)
    return loop.names


def configs() -> Iterator[Any]:
    for name, path in CONFIGS.items():
        yield pytest.param(path, [], id=name)
    for overrides in VARIANTS:
        yield pytest.param(PAPER / "tinyllama_1b.yaml", overrides, id=" ".join(overrides))


@pytest.mark.parametrize(("path", "overrides"), [*configs()])
def test_every_stage_of_a_method_is_planned_or_said_not_to_be(path: Path, overrides: list[str]):
    # A curve's stages are named by what the run has kept: they have a test of their own.
    config = load_run_config(path, [*overrides, "curve.prompts=0", "curve.student_states=0"])
    found = stages_of(config)
    named = [use.stage for use in found.uses] + [stage for stage, _ in found.unplanned]
    assert set(named) == set(run_by(config))
    assert all(use.group in stages.GROUPS for use in found.uses)
    assert all(use.amount >= 0 for use in found.uses)


def test_every_method_has_its_list():
    assert stages.METHODS.keys() == METHODS.keys()


def amounts(*overrides: str, name: str = "llama3_8b.yaml") -> dict[tuple[str, str, str], float]:
    config = load_run_config(PAPER / name, [*overrides])
    uses = stages_of(config).uses
    return {(one.stage, one.recipe.kind, one.recipe.section): one.amount for one in uses}


def test_amounts_by_hand():
    """3,000 prompts of 4 samples, of which 2,250 are probed; 4 responses compete."""
    base = amounts()
    assert base["generate", "write", "generation"] == 3000
    assert base["generate", "write", "responses"] == 12000
    assert base["influence", "score", "first_order"] == 9000
    assert base["influence", "score", "exact"] == 16
    assert base["influence", "gradient", ""] == 1
    assert base["dpo", "dpo", ""] == 2250 * 4 * 3 / 4
    assert base["train-tuned", "train", "sft"] == 10000 * 360
    both = amounts(name="ablations/optimise_both.yaml")
    assert both["respond", "write", "responses"] == 9000
    assert both["influence-responses", "score", "first_order"] == 36000
    assert both["dpo", "dpo", ""] == (2250 + 9000) * 3
    judged = amounts(name="main/llama3_8b/self_reward_1.yaml")
    assert judged["judge", "write", "judging"] == 48000
    assert judged["dpo", "dpo", ""] == 12000
    tuned = amounts(name="ablations/optimise_bootstrap.yaml")
    assert tuned["bootstrap", "train", "bootstrap"] == 4500 * 360
    assert ("dpo", "dpo", "") not in tuned


@pytest.mark.parametrize(
    ("settings", "audits"),
    [
        (["influence.method=first_order"], [("score", "exact")]),
        (["influence.method=first_order", "influence.precision=bfloat16"], [("audit", "exact")]),
        (["influence.method=exact", "influence.precision=bfloat16"], [("audit", "exact")]),
        (["influence.method=exact"], []),
        (["influence.method=grad_dot"], []),
    ],
    ids=lambda one: "-".join(map(str, one)),
)
def test_the_audit_is_the_one_that_a_run_makes(settings: list[str], audits: list[tuple[str, str]]):
    uses = stages_of(
        load_run_config(PAPER / "llama3_8b.yaml", ["influence.audit=8", *settings])
    ).uses
    found = [use.recipe[:2] for use in uses if use.stage == "influence" and use.amount == 8]
    assert found == audits


def test_what_has_no_program_is_said():
    def reasons(name: str, *overrides: str) -> dict[str, str]:
        return dict(stages_of(load_run_config(PAPER / name, [*overrides])).unplanned)

    assert "behind https://api.openai.com/v1" in reasons("ablations/signal_judge.yaml")["judge"]
    assert "host" in reasons("ablations/signal_random.yaml")["random"]
    served = reasons("main/llama3_8b/self_instruct_gpt4o.yaml")
    assert "behind" in served["synthesise-untuned"]
    assert "vLLM" in reasons("llama3_8b.yaml", "generator=vllm")["generate"]
    assert "losses" not in reasons("ablations/signal_training_loss.yaml")
    extra = 'evaluation.evaluations=["reference_loss","lm_harness"]'
    assert "lm_harness" in reasons("llama3_8b.yaml", extra)["evaluate-tuned"]


def test_stages_of_equal_shapes_share_a_program():
    config = load_run_config(PAPER / "llama3_8b.yaml")

    def together(config: RunConfig) -> list[set[str]]:
        shared: list[list[Use]] = gathered(config, stages_of(config).uses)
        return [{use.stage for use in uses} for uses in shared]

    assert {"warmup", "train-tuned", "train-untuned"} in together(config)
    assert {"generate", "synthesise-untuned", "synthesise-tuned"} in together(config)
    other = load_run_config(PAPER / "llama3_8b.yaml", ["warmup.micro_batch=1"])
    assert {"warmup"} in together(other)


def test_curves_are_further_runs_of_the_same_programs():
    settings = ["curve.prompts=8", "dpo.keep_every=1000", "curve.student_states=100"]
    config = load_run_config(PAPER / "llama3_8b.yaml", settings)
    plain = load_run_config(PAPER / "llama3_8b.yaml")
    found = stages_of(config).uses
    # 3,375 steps of DPO: the first teacher, those after 1,000, 2,000 and 3,000, and the last.
    assert [one.stage for one in found if one.group == "sft"][-5:] == [
        f"train-curve-{step}" for step in range(5)
    ]
    # 10,000 rows are 312 steps: three states of each of two students.
    along = {one.stage for one in found if one.stage.startswith("influence-along")}
    assert len(along) == 6
    assert len(gathered(config, found)) == len(gathered(plain, stages_of(plain).uses))
