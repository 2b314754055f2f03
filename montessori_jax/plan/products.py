"""Arithmetic of a traced program: its matrix products, every trip of its loops counted."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Passes of a TPU's bfloat16 matrix unit for a product of float32 numbers, by precision.
PASSES = {"DEFAULT": 1, "HIGH": 3, "HIGHEST": 6, "BF16_BF16_F32_X3": 3, "BF16_BF16_F32_X6": 6}


class Products(NamedTuple):
    """FLOPs of all chips together, two for a multiplication and addition.

    ``flops`` counts every product once; ``unit`` as often as a bfloat16 matrix unit goes through
    it (six times for a float32 product at the highest precision).
    """

    flops: float
    unit: float

    def times(self, number: float) -> "Products":
        return Products(self.flops * number, self.unit * number)

    def plus(self, other: "Products") -> "Products":
        return Products(self.flops + other.flops, self.unit + other.unit)


def products_of(jaxpr: Any, trips: Sequence[int] = ()) -> Products:
    """Of a traced program, with what is recomputed; attention kernels at their whole square.

    Args:
        jaxpr: the trace's.
        trips: of while loops, whose count the data tell, the outermost first; deeper ones once.
    """
    total = Products(0.0, 0.0)
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in inner.eqns:
        total = total.plus(_of_equation(equation, trips))
    return total


def _of_equation(equation: Any, trips: Sequence[int]) -> Products:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "cond":
        branches = [products_of(branch, trips) for branch in parameters["branches"]]
        return max(branches, key=lambda one: one.unit)
    if name == "scan":
        return products_of(parameters["jaxpr"], trips).times(parameters["length"])
    if name == "while":
        times = trips[0] if trips else 1
        return products_of(parameters["body_jaxpr"], trips[1:]).times(times)
    if name == "shard_map":
        mesh = parameters["mesh"]
        ways = math.prod(mesh.shape[axis] for axis in parameters["newly_manual_axes"])
        return products_of(parameters["jaxpr"], trips).times(ways)
    if name == "pallas_call":
        grid = math.prod(int(size) for size in parameters["grid_mapping"].grid)
        return products_of(parameters["jaxpr"], trips).times(grid)
    total = Products(0.0, 0.0)
    for value in parameters.values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, core.Jaxpr | core.ClosedJaxpr):
                total = total.plus(products_of(one, trips))
    return total


def _dot(equation: Any) -> Products:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    flops = 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    return Products(flops, flops * _passes(equation))


def _passes(equation: Any) -> int:
    if all(var.aval.dtype != jax.numpy.float32 for var in equation.invars):
        return 1
    precision = equation.params.get("precision")
    first = precision[0] if isinstance(precision, tuple) else precision
    return PASSES.get(getattr(first, "name", "DEFAULT"), 1)
