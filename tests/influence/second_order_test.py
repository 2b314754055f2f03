"""Curvature: Hessian products against torch, and the order to which the estimate is right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from montessori_jax.influence import Candidate, single_batch
from tests.influence.problems import INPUTS, WIDTH, curved, from_rest, reference_points


def torch_reference_loss(inner, outer):
    x, y = (torch.from_numpy(part) for part in reference_points())
    return torch.mean((torch.tanh(x @ inner) @ outer - y) ** 2)


def test_hessian_products_are_those_of_torch():
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        problem = curved(optax.sgd(0.1))
        vector = {
            "inner": jnp.asarray(rng.normal(size=(INPUTS, WIDTH))),
            "outer": jnp.asarray(rng.normal(size=WIDTH)),
        }
        found = problem.reference.hvp(problem.params, vector)

    def torches(tree):
        return tuple(torch.from_numpy(np.array(tree[name])) for name in ("inner", "outer"))

    _, expected = torch.autograd.functional.hvp(
        torch_reference_loss, torches(problem.params), torches(vector)
    )
    np.testing.assert_allclose(found["inner"], expected[0], rtol=1e-10)
    np.testing.assert_allclose(found["outer"], expected[1], rtol=1e-10)


@pytest.mark.parametrize("point", ["params", "zero_gradient", "mean_update"])
def test_halving_the_rate_with_moments_fixed_quarters_the_relative_error(point):
    # The offset is taken off: exact's own part against the estimate's, both of the order of lr.
    errors = []
    with jax.enable_x64(True):
        for rate in (1e-3, 5e-4):
            problem = curved(optax.adam(rate), moments=True)
            truth = problem.influences("exact")
            estimate = problem.influences("second_order", expansion_point=point)
            errors.append(np.abs(estimate - truth).sum() / np.abs(truth).sum())
    np.testing.assert_allclose(errors[1] / errors[0], 0.25, rtol=0.02)


def test_a_quadratic_loss_leaves_no_error():
    rng = np.random.default_rng(6)
    half = rng.normal(size=(5, 5))
    with jax.enable_x64(True):
        params = jnp.asarray(rng.normal(size=5))
        tx = optax.sgd(0.3)
        reference = single_batch(lambda p: (p @ (half @ half.T) @ p)[None], np.ones(1))
        items = [Candidate(str(i), rng.normal(size=5)) for i in range(3)]
        truth, estimate = (
            from_rest(lambda p, data: p @ data, params, tx, items, reference, method=method)
            for method in ("exact", "second_order")
        )
    for a, b in zip(truth, estimate, strict=True):
        assert b.influence == pytest.approx(a.influence, rel=1e-12)
        assert b.method == "second_order"
