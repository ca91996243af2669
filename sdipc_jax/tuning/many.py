"""Several concepts at once: one program, one copy of what does not train."""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sdipc_jax.bundle import Bundle
from sdipc_jax.projection import Projection
from sdipc_jax.tuning.losses import Batch
from sdipc_jax.tuning.settings import TuningSettings
from sdipc_jax.tuning.step import Metrics, State, init, step


def init_many(bundle: Bundle, settings: TuningSettings, count: int, projection: Projection | None = None) -> State:
    """The states of `count` concepts, stacked along a first axis; `frozen` is there once."""
    one = init(bundle, settings, projection)

    def stacked(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (count, *leaf.shape))

    return _of_each(one, jax.tree.map(stacked, (one.step, one.params, one.ema, one.optimizer)))


@partial(jax.jit, static_argnames="axis_name")
def step_many(
    states: State, batches: Batch, keys: Key[Array, " K"], *, axis_name: str | None = None
) -> tuple[State, Metrics]:
    """`step` for each concept with its own batch and key, all with a first axis of K."""
    axes = _of_each(dataclasses.replace(states, frozen=cast(Any, None)), (0, 0, 0, 0))
    return jax.vmap(partial(step, axis_name=axis_name), in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, batches, keys)


def select(states: State, index: int) -> State:
    """The state of one concept."""
    each = (states.step, states.params, states.ema, states.optimizer)
    return _of_each(states, jax.tree.map(lambda leaf: leaf[index], each))


def _of_each(state: State, parts: tuple) -> State:
    names = ("step", "params", "ema", "optimizer")
    return dataclasses.replace(state, **dict(zip(names, parts, strict=True)))
