from pathlib import Path

import pytest

from montessori_jax.config import InfluenceConfig, RunConfig, as_dict
from montessori_jax.config_file import build, load_run_config

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
