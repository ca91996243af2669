"""Where the tokens of a prompt are looked at while a picture is made: cross-attention's weights as maps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.errors import InputError
from sdipc_jax.models.attention import WATCHED
from sdipc_jax.models.weighted import cross_attention_layers
from sdipc_jax.prompts.prompt import AnyPrompt
from sdipc_jax.sampling.loop import advance, predicted
from sdipc_jax.sampling.request import Request, begin
from sdipc_jax.sampling.weights import over_layers
from sdipc_jax.tracing import under_our_rules

# The attention of a block that reads the prompt.
_READING = "attn2"


def attention_maps(
    bundle: Bundle,
    context: AnyPrompt,
    *,
    shares: Sequence[float] = (0.0, 0.5, 1.0),
    layers: Sequence[str] | None = None,
    **settings: Any,
) -> Float[np.ndarray, "N S R L h w"]:
    """How much each place of the latents looks at each token, at some evaluations of the very loop of `generate`.

    The mean over heads, over the layers that are named, and over the blocks of each, whose maps are resized to the
    latents' grid. Those of a place add up to 1 over a prompt's tokens, but for what `kept` takes away.

    Args:
        shares: of the evaluations, 0 the first and 1 the last; S of them.
        layers: names as `sampling.weights.layer_names` has them, or their beginnings; all of them if None.
        settings: as for `generate`. Where deep features are kept, the evaluation is one of those that run everything.

    Raises:
        InputError: no such layer, no shares or shares outside of 0 to 1, or as `generate`.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise InputError(f"shares are {list(shares)}, expected at least one, each from 0 to 1: correct them")
    unet = bundle.config.unet
    chosen = np.ones(len(cross_attention_layers(unet))) if layers is None else over_layers(unet, layers).ravel()
    request, state = begin(bundle, context, **settings)
    every = 1 if request.cache_interval is None else int(request.cache_interval)
    places = [round(share * (request.evaluations - 1)) // every * every for share in shares]
    found, done = {}, 0
    for place in sorted(set(places)):
        state, done = advance(bundle, request, state, done, place), place
        found[place] = np.asarray(_maps_at(tuple(map(bool, chosen)), bundle, request, state[0], place))
    return np.stack([found[place] for place in places], axis=1)


@partial(jax.jit, static_argnums=0)
@under_our_rules
def _maps_at(
    chosen: tuple[bool, ...], bundle: Bundle, request: Request, x: Float[Array, "N h w C"], i: Any
) -> Float[Array, "N R L h w"]:
    """Of the prompts that are no negative ones."""
    count, height, width, _ = x.shape
    watched = predicted(bundle, request, i, x, count, watched=WATCHED)[WATCHED]
    maps = []
    for wanted, (block, transformer) in zip(chosen, cross_attention_layers(bundle.config.unet), strict=True):
        if wanted:
            blocks = watched[block][transformer].values()
            weights = sum(each[_READING]["weights"][0] for each in blocks) / len(blocks)
            rows, columns = _grid(weights.shape[1], height, width)
            grid = jnp.moveaxis(weights, 1, 2).reshape(count, -1, weights.shape[2], rows, columns)
            maps.append(jax.image.resize(grid, (*grid.shape[:3], height, width), "linear"))
    return sum(maps) / len(maps)


def _grid(places: int, height: int, width: int) -> tuple[int, int]:
    """The size of a layer's grid, which is the latents' halved, and rounded up, until it has so many places."""
    while height * width > places:
        height, width = -(-height // 2), -(-width // 2)
    return height, width
