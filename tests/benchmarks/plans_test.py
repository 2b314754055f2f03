"""Which pages the plans' benchmark can make, and which programs the scaling one compiles."""

from importlib.util import find_spec

import pytest

from benchmarks import plans, scaling


def test_every_config_of_the_paper_can_be_asked_for_by_name(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(plans, "write", lambda config, target: made.append((config, target)))
    monkeypatch.setattr(plans, "PAGES", tmp_path)
    names = ["main/llama3_8b/self_reward_1", "ablations/signal_judge"]
    monkeypatch.setattr("sys.argv", ["plans", "--config", *names, "--target", "v5p:2x2x1"])
    plans.main()
    assert made == [(name, "v5p:2x2x1") for name in names]
    place = plans.page(names[0], "v5p:2x2x1")
    assert place.name == "main-llama3_8b-self_reward_1-v5p-2x2x1.md"
    place.write_text("DOES NOT FIT")
    shown = "\n".join(plans.index())
    assert f"[{names[0]} on v5p:2x2x1]({place.name}): does not fit" in shown


def test_without_a_name_the_five_students_are_planned(monkeypatch, tmp_path):
    made = set()
    monkeypatch.setattr(plans, "write", lambda config, target: made.add(config))
    monkeypatch.setattr(plans, "PAGES", tmp_path)
    monkeypatch.setattr("sys.argv", ["plans"])
    plans.main()
    assert made == set(plans.CONFIGS)
    assert len(plans.CONFIGS) == 5 < len(plans.NAMED)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: montessori-jax[tpu-plan]")
def test_scaling_compiles_the_reference_gradient_too():
    found = [(one.stage, one.name) for one in scaling.programs(4)]
    assert found == [
        ("sft", "step"),
        ("influence", "exact: candidates"),
        ("influence", "linearized: candidates"),
        ("influence", "reference gradient"),
    ]
    assert len(found) * len(scaling.TOPOLOGIES) == 16
