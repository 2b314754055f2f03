"""What a trained parameter takes by counting: as many bytes as its state really has."""

import jax
import pytest

from montessori_jax.config import SftConfig
from montessori_jax.config_file import load_run_config
from montessori_jax.plan.analytic import trained_bytes
from montessori_jax.plan.plan import Plan, make_plan
from montessori_jax.plan.targets import parse_target
from montessori_jax.training.optimizer import make_optimizer
from tests.plan.plan_test import CONFIG
from tests.training import samples


@pytest.mark.parametrize(
    "settings",
    [SftConfig(), SftConfig(moments_dtype="bfloat16"), SftConfig(optimizer="sgd")],
    ids=["adamw", "narrow", "sgd"],
)
def test_bytes_of_weights_gradient_and_moments(settings: SftConfig):
    model, params, _ = samples.twins()
    state = jax.eval_shape(make_optimizer(settings, 2).init, params)
    # The counts of steps are no moments.
    held = [leaf for leaf in jax.tree.leaves((params, params, state)) if leaf.ndim]
    assert (
        sum(leaf.size * leaf.dtype.itemsize for leaf in held)
        == trained_bytes(model, settings)["weights, gradient and moments"]
    )


def planned(*settings: str, search: bool = False) -> Plan:
    """TinyLlama-1.1B on one card."""
    return make_plan(load_run_config(CONFIG, settings), parse_target("a100-80:1"), search=search)


def test_the_largest_settings_fit_and_the_next_ones_do_not():
    settings = ["influence.method=first_order", "influence.chunk=64"]
    found = {one.setting: one for one in planned(*settings, search=True).largest}
    rows = found["dpo.micro_batch"]
    assert rows.value > 1
    for name in ("sft.micro_batch", "influence.block"):
        one = found[name]
        assert one.too_large == one.value + 1
        for value, fits in ((one.value, True), (one.too_large, False)):
            large = planned(*settings, f"{name}={value}").too_large()
            assert any(held.stage.startswith(name.partition(".")[0]) for held in large) != fits


def test_a_block_is_no_larger_than_a_chunk():
    [found] = [
        one
        for one in planned("influence.chunk=3", search=True).largest
        if one.setting == "influence.block"
    ]
    assert (found.value, found.enough) == (3, True)
