import re
from pathlib import Path

import pytest

from montessori_jax.config import InfluenceConfig, RunConfig, as_dict
from montessori_jax.config_file import build, load_run_config
from montessori_jax.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def test_a_config_survives_its_own_yaml():
    config = RunConfig()
    assert build(RunConfig, as_dict(config), "round trip") == config


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        InfluenceConfig().method = "exact"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_opens_with_its_command(path):
    load_run_config(path)
    head = path.read_text().split("\n\n")[0]
    for word in ("montessori run", "Hardware", "Duration", "Expect"):
        assert word in head, word


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"judge": {"base_url": "https://me:secret@host/v1"}}, "leave out user, password"),
        ({"curve": {"student_states": 2}, "method": "self_instruct"}, "belongs to the method"),
        (
            {"curve": {"student_states": 2}, "sft": {"moments_dtype": "bfloat16"}},
            "sft.moments_dtype: float32",
        ),
        (
            {"curve": {"prompts": 2}, "dpo": {"keep_every": 2}, "optimise": "bootstrap"},
            "anything but bootstrap",
        ),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(values, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        build(RunConfig, values, "test")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
