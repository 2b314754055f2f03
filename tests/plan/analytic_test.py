"""What a trained parameter takes by counting: as many bytes as its state really has."""

import jax
import pytest

from montessori_jax.config import SftConfig
from montessori_jax.plan.analytic import trained_bytes
from montessori_jax.training.optimizer import make_optimizer
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
