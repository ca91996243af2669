"""What can be told of a program while it is traced, and what is settled for all programs."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])
Tree = TypeVar("Tree")


def under_our_rules(function: Function) -> Function:
    """Traces a function as if JAX's own switches were at what its numbers were checked with.

    `jax_threefry_partitionable` decides what is drawn from a key: pictures and results of tuning would depend on the
    environment. `jax_numpy_rank_promotion` is for the code of those who set it.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.threefry_partitionable(True), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return traced  # type: ignore[return-value]


def platform() -> str:
    """What the program is for, in so far as it can be told."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    # There is none outside of a mesh, and JAX 0.10.0's do not say it.
    return getattr(device, "platform", None) or jax.default_backend()


def varying_axes(array: Any) -> frozenset[str]:
    """The axes of a mesh over which an array differs, as far as an enclosing `shard_map` keeps account of it.

    None outside of one, under `pmap` and `vmap`, and where it was told not to (`check_vma=False`).
    """
    kind: Any = jax.typeof(array)
    return kind.manual_axis_type.varying


def varying(tree: Tree, like: Any) -> Tree:
    """Inside shard_map a type tells over which axes of the mesh values differ, and a loop has to end with the type
    that it began with: that of its results, which differ wherever anything that they depend on does."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves((tree, like))))

    def vary(leaf: Any) -> Any:
        missing = tuple(axes - varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)
