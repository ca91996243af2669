"""The sampler over a mesh: on each device the program that one device alone would run, on its own rows."""

import dataclasses
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from sdipc_jax.batches import pad
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.parallel.mesh import AXIS, Tree, on_each_device, place, replicate
from sdipc_jax.prompts.prompt import AnyPrompt
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import Request, State, begin
from sdipc_jax.sampling.sample import in_pieces

# Of the progress bar, where several processes have to cut the loop in the same places.
_PIECES = 20
# What of a request every device has whole, and what lies on them in rows.
_WHOLE = ("schedule", "guided", "cache_interval", "eta", "winograd")
_IN_ROWS = ("context", "added", "weights", "keys", "guidance_scale", "repainting", "controls")


def generate(
    mesh: Mesh,
    bundle: Bundle,
    context: AnyPrompt,
    report: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> tuple[Float[Array, "N H W 3"], Bool[Array, " N"]]:
    """`sdipc_jax.generate` with the pictures divided over the devices of a mesh, which exchange nothing meanwhile.

    A batch that the mesh does not divide is filled up, and what is too many cut off again. Pictures do not depend on
    the number of devices, but for rounding: programs for batches of another size differ by up to 2 levels of 255. With
    several processes, all must make the same call with the same values, and all get all pictures.

    Args:
        mesh: from `make_mesh`.
        bundle: copied to every device unless `replicate` has done so.
        report: called with the evaluations done and their total, from time to time.
        settings: as for `sdipc_jax.generate`.

    Returns:
        The pictures, and which of them the safety checker flagged; not waited for.

    Raises:
        InputError: as `sdipc_jax.generate`.
    """
    bundle, context = _here((bundle, context))
    if mesh.size == 1 and mesh.devices.flat[0] != jax.devices()[0]:
        bundle, context = jax.device_put((bundle, context), mesh.devices.flat[0])
    request, state = begin(bundle, context, **_here(settings))
    count = len(context)
    run, decode = partial(advance, bundle, request), partial(finish, bundle)
    if mesh.size > 1:
        bundle, request, state = replicate(mesh, bundle), _divided(mesh, request), place(mesh, pad(state, mesh.size))
        run, decode = partial(advance_on, mesh, bundle, request), partial(finish_on, mesh, bundle)
    if report is None:
        state = run(state, 0, request.evaluations)
    else:
        piece = ceil(request.evaluations / _PIECES) if jax.process_count() > 1 else None
        state = in_pieces(run, request, state, report, piece)
    del request, run  # As in `sdipc_jax.generate`.
    results = decode(state)
    return results if mesh.size == 1 else _first_rows(mesh, count, results)


@partial(jax.jit, static_argnums=0)
def advance_on(mesh: Mesh, bundle: Bundle, request: Request, state: State, first: Any, last: Any) -> State:
    """`generate.advance` on each device, with its part of a request and state."""
    specs = (P(), division(request), P(AXIS), P(), P())
    return on_each_device(advance, mesh, specs, P(AXIS))(bundle, request, state, first, last)


@partial(jax.jit, static_argnums=0)
def finish_on(mesh: Mesh, bundle: Bundle, state: State) -> tuple[Float[Array, "N H W 3"], Bool[Array, " N"]]:
    """`generate.finish` on each device, with its part of the state."""
    return on_each_device(finish, mesh, (P(), P(AXIS)), P(AXIS))(bundle, state)


def division(request: Request) -> Any:
    """How the parts of a request lie on a mesh."""
    parts = dict.fromkeys(_WHOLE, P()) | dict.fromkeys(_IN_ROWS, P(AXIS))
    return dataclasses.replace(request, **cast(Any, parts))


def _divided(mesh: Mesh, request: Request) -> Request:
    """A request with its rows on the devices: with each prompt its negative one."""
    alone = {name: getattr(request, name) for name in ("keys", "guidance_scale", "repainting", "controls")}
    alone = place(mesh, pad(alone, mesh.size))
    halves = request.context.shape[0] // request.keys.shape[0]
    each = len(alone["keys"]) // mesh.size

    def divided(rows: Float[Array, "M ..."]) -> Float[Array, "M ..."]:
        pairs = rows.reshape(halves, -1, *rows.shape[1:]).swapaxes(0, 1)
        pairs = pad(pairs, mesh.size).reshape(mesh.size, each, halves, *rows.shape[1:])
        return place(mesh, pairs.swapaxes(1, 2).reshape(-1, *rows.shape[1:]))

    rows = {name: jax.tree.map(divided, getattr(request, name)) for name in ("context", "added", "weights")}
    whole = replicate(mesh, {name: getattr(request, name) for name in _WHOLE})
    return dataclasses.replace(request, **rows, **alone, **whole)


def _here(tree: Tree) -> Tree:
    """Arrays that are whole on every device as they are on this process's first, without a copy."""

    def one(leaf: Any) -> Any:
        whole = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1 and leaf.is_fully_replicated
        return leaf.addressable_data(0) if whole else leaf

    return jax.tree.map(one, tree)


def _first_rows(mesh: Mesh, count: int, tree: Tree) -> Tree:
    """The first rows of divided arrays, whole on every device, and so on every process."""
    return jax.jit(_cut, static_argnums=0, out_shardings=NamedSharding(mesh, P()))(count, tree)


def _cut(count: int, tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf[:count], tree)
