"""Layers whose parameters are given, as a checkpoint's are, and seldom drawn."""

import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sdipc_jax.compilation import remembered
from sdipc_jax.records import digest_of

# A stream of random numbers that is no such thing: where there is one, parameters are zeros.
_SHAPES_ALONE = "shapes alone"


class Given(nn.Module):
    """A module whose parameters are taken as they are, where they are there.

    Flax would compare the shape of each with that of an initial value, which it traces for that alone, at every
    application; that takes longer than all else in a network. Here shapes are compared once, as parameters are read.
    """

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **init_kwargs: Any) -> Any:
        """The parameter, or where there is none its initial value."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        if self.has_rng(_SHAPES_ALONE):
            init_fn = _zeros
        return super().param(name, init_fn, *init_args, **init_kwargs)


def _zeros(key: Any, shape: Any, dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


# The shape and the dtype of an input.
Described = tuple[tuple[int, ...], Any]


def shapes(module: nn.Module, *inputs: Described, **named: Described) -> dict[str, Any]:
    """The shapes and dtypes of a module's parameters, for inputs of a shape and a dtype each; nothing is drawn."""
    # A copy, since trees are dictionaries, which their owners may change.
    return jax.tree.map(lambda leaf: leaf, _shapes(module, inputs, tuple(named.items())))


@functools.lru_cache(maxsize=64)
def _shapes(
    module: nn.Module, inputs: tuple[Described, ...], named: tuple[tuple[str, Described], ...]
) -> dict[str, Any]:
    def trace() -> dict[str, Any]:
        arrays = [jax.ShapeDtypeStruct(*each) for each in inputs]
        by_name = {name: jax.ShapeDtypeStruct(*each) for name, each in named}
        key = jax.random.key(0)
        tree = jax.eval_shape(module.init, {"params": key, _SHAPES_ALONE: key}, *arrays, **by_name)["params"]
        return {"/".join(path): [leaf.shape, leaf.dtype.name] for path, leaf in flatten_dict(tree).items()}

    found = remembered("shapes", f"{version('flax')} {_code()} {module!r} {inputs} {named}", trace)
    leaves = {tuple(path.split("/")): jax.ShapeDtypeStruct(tuple(size), dtype) for path, (size, dtype) in found.items()}
    return unflatten_dict(leaves)


@functools.cache
def _code() -> str:
    """The digest of all that decides which parameters a network has."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest_of([path.read_bytes() for path in files])


class Dense(Given, nn.Dense):
    """Flax's."""


class Embed(Given, nn.Embed):
    """Flax's."""


class LayerNorm(Given, nn.LayerNorm):
    """Flax's."""
