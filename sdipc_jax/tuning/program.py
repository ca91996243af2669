"""The compiled step over a mesh: batches divided, everything else on every device."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sdipc_jax.parallel import AXIS, on_each_device
from sdipc_jax.tuning.losses import Batch
from sdipc_jax.tuning.many import step_many
from sdipc_jax.tuning.step import Metrics, Moving, State, moving, step, with_moving

Train = Callable[[Moving, State, Batch], tuple[Moving, Metrics]]


def still(state: State) -> State:
    """What no step changes, without the rest."""
    return with_moving(state, cast(Moving, (None, None, None, None)))


def train_step(mesh: Mesh, *, many: bool = False, turns: int = 1) -> Train:
    """`tuning.step` as one program over a mesh.

    It takes the moving and the still part of a state, whole on every device, and a batch divided by rows. The moving
    part's memory is used for the next one's. An update's key follows from the settings' seed and its number.

    Args:
        many: the state is one of several concepts, and the batch has them along a second axis, (N, K, ...): rows
            first, as for one.
        turns: of each device, as `tuning.step` has them.
    """

    def per_device(parts: Moving, rest: State, batch: Batch) -> tuple[Moving, Metrics]:
        state, settings = with_moving(rest, parts), rest.settings

        def key(count: Any) -> Any:
            run = jax.random.key(settings.seed, impl="threefry2x32")
            return jax.random.fold_in(run, count // settings.accumulate)

        if many:
            batch = cast(Batch, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch))
            state, metrics = step_many(state, batch, jax.vmap(key)(state.step), axis_name=AXIS, turns=turns)
        else:
            state, metrics = step(state, batch, key(state.step), axis_name=AXIS, turns=turns)
        return moving(state), metrics

    mapped = on_each_device(per_device, mesh, (P(), P(), P(AXIS)), (P(), P()))
    return jax.jit(mapped, donate_argnums=0)


def turns_of(rows: int, at_once: int) -> int:
    """Into how few equal parts so many rows can be divided of which none is larger than `at_once`.

    >>> turns_of(8, 4), turns_of(6, 4), turns_of(2, 4)
    (2, 2, 1)
    """
    return next(count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= at_once)
