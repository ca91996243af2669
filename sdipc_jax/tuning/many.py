"""Several concepts at once: one program, one copy of what does not train."""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.prompts.projection import Projection
from sdipc_jax.tuning.losses import Batch
from sdipc_jax.tuning.settings import TuningSettings
from sdipc_jax.tuning.step import Metrics, State, init, moving, step, with_moving


def init_many(bundle: Bundle, settings: TuningSettings, count: int, projection: Projection | None = None) -> State:
    """The states of `count` concepts, stacked along a first axis; `frozen` is there once."""
    one = init(bundle, settings, projection)

    def stacked(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (count, *leaf.shape))

    return with_moving(one, jax.tree.map(stacked, moving(one)))


@partial(jax.jit, static_argnames=("axis_name", "turns"))
def step_many(
    states: State, batches: Batch, keys: Key[Array, " K"], *, axis_name: str | None = None, turns: int = 1
) -> tuple[State, Metrics]:
    """`step` for each concept with its own batch and key, all with a first axis of K."""
    axes = with_moving(dataclasses.replace(states, frozen=cast(Any, None)), (0, 0, 0, 0))
    one = partial(step, axis_name=axis_name, turns=turns)
    return jax.vmap(one, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, batches, keys)


def select(states: State, index: int) -> State:
    """The state of one concept."""
    return with_moving(states, jax.tree.map(lambda leaf: leaf[index], moving(states)))
