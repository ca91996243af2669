"""Useful arithmetic of a function: its matrix products and convolutions, however they are computed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flops_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of one call, a multiplication and an addition counted as two.

    A `while` loop's body counts once, a scan's as often as it runs, and of branches the one with most. cuDNN's
    attention counts as the two products that it stands for.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Jaxpr) -> float:
    total = 0.0
    equation: Any
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
        elif name.startswith("dot_product_attention_fwd"):
            total += 4 * math.prod(equation.invars[0].aval.shape) * equation.invars[1].aval.shape[1]
        elif name == "cond":
            total += max(map(_flops, _within(params)))
        else:
            total += (params["length"] if name == "scan" else 1) * sum(map(_flops, _within(params)))
    return total


def _within(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each
