"""LLM2LLM on a real model, at a quarter of the quickstart's size; a small form is methods_test."""

import math
from pathlib import Path

import pytest

from montessori_jax.config_file import load_run_config
from montessori_jax.pipeline import run
from montessori_jax.report.summary import Summary
from montessori_jax.stopping import Stop

ROOT = Path(__file__).resolve().parents[2]
QUARTER = [
    "method=llm2llm",
    "synthesis_prompts=3",
    "llm2llm.seed_rows=4",
    "llm2llm.hard_share=0.5",
    "sft.rows=8",
    "sft.batch_size=4",
    "data.num_heldout=8",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def summary(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    place = tmp_path_factory.mktemp("smollm2") / "run"
    config = load_run_config(ROOT / "configs/quickstart.yaml", [*QUARTER, f"run_dir={place}"])
    return run(config, say=print, stop=Stop(), quiet=True)


def test_a_real_teacher_expands_what_a_real_student_finds_hard(summary: Summary):
    stages = summary["iterations"][0]["stages"]
    assert stages["losses"]["rows"] == 4
    assert stages["losses"]["lowest"] < stages["losses"]["highest"]
    assert stages["expand"]["expanded"] == 2
    assert stages["expand"]["yield"] > 0.3
    assert stages["mix"] == {"rows": 8, "seeds": 4, "written": {"iteration-1": 4}}
    for name in ("untrained", "seeds", "expanded"):
        assert math.isfinite(stages[f"evaluate-{name}"]["reference_loss"]["loss"])
    losses = [
        stages[f"evaluate-{name}"]["reference_loss"]["loss"] for name in ("seeds", "expanded")
    ]
    assert losses[0] != losses[1]
