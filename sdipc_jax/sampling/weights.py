"""Weights of several prompts for one picture, over layers, steps and places: small functions whose products broadcast.

weights = sampling.weights.over_steps(50, 0.0, 0.6) * sampling.weights.over_layers(bundle.config.unet, ["mid", "up.1"])
pictures = sdipc.generate(bundle, context, weights=sampling.weights.and_the_rest(weights), seeds=0, steps=50)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.errors import InputError
from sdipc_jax.models import UNetConfig
from sdipc_jax.models.weighted import cross_attention_layers

# picture, prompt, layer, evaluation, row, column
_AXES = 6


def over_steps(evaluations: int, start: float, end: float) -> Float[np.ndarray, "1 1 1 evaluations 1 1"]:
    """1 at the evaluations from the share `start` to the share `end` of all, 0 at the others.

    Args:
        evaluations: of the UNet; PNDM has one more than steps.

    Raises:
        InputError: shares out of order, or not from 0 to 1.

    >>> over_steps(5, 0.0, 0.6).ravel().tolist()
    [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    if not 0 <= start < end <= 1:
        raise InputError(f"start is {start} and end {end}, expected 0 <= start < end <= 1: correct them")
    share = np.arange(evaluations) / evaluations
    # A little rounding must not decide.
    return ((share >= start - 1e-9) & (share < end - 1e-9)).astype(np.float32).reshape(1, 1, 1, -1, 1, 1)


def layer_names(config: UNetConfig) -> tuple[str, ...]:
    """The names of the layers of cross-attention: `down.BLOCK.INDEX`, `mid`, `up.BLOCK.INDEX`.

    >>> layer_names(UNetConfig(cross_attention_dim=768))[5:8]
    ('down.2.1', 'mid', 'up.1.0')
    """
    short = {"down_blocks": "down", "up_blocks": "up"}

    def name(block: str, index: str) -> str:
        kind, _, number = block.rpartition("_")
        return f"{short[kind]}.{number}.{index.rpartition('_')[2]}" if kind in short else "mid"

    return tuple(name(block, index) for block, index in cross_attention_layers(config))


# What layers do, by the names of all layers of a family. The first is the shipped checkpoint's, measured
# (docs/algebra.md); the others those of Stable Diffusion 1.x and 2.x, as people who use IP-Adapter with 1.5 have it,
# and of SDXL, as InstantStyle (Wang et al. 2024, arXiv 2404.02733) has it: not measured here.
_SETS: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {
    ("down.0.0", "down.1.0", "mid", "up.0.0", "up.0.1", "up.1.0", "up.1.1"): {
        "style": ("up.1",),
        "composition": ("down", "mid"),
    },
    (
        *(f"down.{block}.{index}" for block in range(3) for index in range(2)),
        "mid",
        *(f"up.{block}.{index}" for block in range(1, 4) for index in range(3)),
    ): {
        "style": ("down.0", "down.1", "mid", "up.2", "up.3"),
        "composition": ("down.2",),
    },
    (
        *(f"down.{block}.{index}" for block in (1, 2) for index in range(2)),
        "mid",
        *(f"up.{block}.{index}" for block in range(2) for index in range(3)),
    ): {"style": ("up.0.1",), "composition": ("down.2.1",)},
}


def _named(known: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names with `style` and `composition` as the layers that they stand for."""
    sets = _SETS.get(tuple(known), {})
    for name in names:
        if name in ("style", "composition") and name not in sets:
            raise InputError(
                f"found the layers {name!r}, which are not known for this checkpoint, expected some of "
                f"{', '.join(known)}: name them"
            )
    return [layer for name in names for layer in sets.get(name, (name,))]


def over_layers(config: UNetConfig, names: Sequence[str]) -> Float[np.ndarray, "1 1 layers 1 1 1"]:
    """1 in the layers that are named, 0 in the others. A name stands for all layers that begin with it: `up`, `up.1`.

    `style` and `composition` stand for the layers that give a picture's colors and its layout, where that is known.

    Raises:
        InputError: a name that no layer has.
    """
    known = layer_names(config)
    chosen = np.zeros(len(known), np.float32)
    for name in _named(known, names):
        named = [layer == name or layer.startswith(f"{name}.") for layer in known]
        if not any(named):
            raise InputError(
                f"the layer {name!r} does not exist, expected one of {', '.join(known)}, or all, style, "
                "composition: correct it"
            )
        chosen[named] = 1
    return chosen.reshape(1, 1, -1, 1, 1, 1)


def over_places(masks: Float[Array | np.ndarray, "*_ h w"]) -> Float[np.ndarray, "N R 1 1 h w"]:
    """Masks of places, from 0 to 1, one for all, one a prompt (R, h, w) or one a picture and prompt (N, R, h, w)."""
    masks = np.asarray(masks, np.float32)
    masks = masks.reshape(*(1,) * (4 - masks.ndim), *masks.shape)
    return masks[:, :, None, None]


def and_the_rest(weights: Float[Any, "N R _ _ _ _"]) -> Float[Any, "N R2 _ _ _ _"]:
    """The weights, and as those of one more prompt what they lack of 1 in sum.

    >>> and_the_rest(over_steps(2, 0.0, 0.5)).ravel().tolist()
    [1.0, 0.0, 0.0, 1.0]
    """
    xp: Any = jnp if isinstance(weights, jax.Array) else np
    return xp.concatenate([weights, 1 - weights.sum(axis=1, keepdims=True)], axis=1)


def side_by_side(
    rows: Sequence[tuple[Any, Float[Any, "1 R ..."]]],
) -> tuple[Any, Float[np.ndarray, "N R2 _ _ _ _"]]:
    """Pictures with different numbers of prompts as one batch, in which those that a picture lacks weigh nothing.

    Args:
        rows: for each picture its prompts, as `image_prompt` and its like give R of them, and their weights.

    Raises:
        InputError: not as many weights as prompts.

    >>> ones, one = np.ones((2, 5, 3)), np.ones((1, 5, 3))
    >>> contexts, weights = side_by_side([(ones, np.array([[0.5, 0.5]])), (one, np.ones((1, 1)))])
    >>> contexts.shape, weights[:, :, 0, 0, 0, 0].tolist()
    ((2, 2, 5, 3), [[0.5, 0.5], [1.0, 0.0]])
    """
    arrays = [np.asarray(given, np.float32) for _, given in rows]
    arrays = [array.reshape(*array.shape, *(1,) * (_AXES - array.ndim)) for array in arrays]
    for (prompts, _), array in zip(rows, arrays, strict=True):
        if array.shape[:2] != (1, len(prompts)):
            raise InputError(
                f"weights have shape {array.shape}, expected (1, {len(prompts)}) and more: one for each prompt"
            )
    most = max(array.shape[1] for array in arrays)
    found = np.zeros((len(rows), most, *np.broadcast_shapes(*(array.shape[2:] for array in arrays))), np.float32)
    for place, array in enumerate(arrays):
        found[place, : array.shape[1]] = array[0]

    def filled(leaf: Array) -> Array:
        return jnp.pad(leaf, ((0, most - len(leaf)), *((0, 0),) * (leaf.ndim - 1)))

    prompts = [jax.tree.map(filled, given) for given, _ in rows]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *prompts), found


def pooled_at(
    weights: Float[Array, "M R _ _ _ _"], vectors: Float[Array, "M *R P"], evaluation: Any
) -> Float[Array, "M P"]:
    """SDXL's pooled vectors of R prompts as the one that its UNet reads, which has neither layers nor places.

    Their sum, each with its prompt's weight at this evaluation in the mean over layers and places. Where all prompts
    have one vector in common it is that.
    """
    if vectors.ndim == 2:
        return vectors
    share = jnp.mean(weights[:, :, :, evaluation if weights.shape[3] > 1 else 0], axis=(2, 3, 4))
    return jnp.einsum("mr,mrp->mp", share, vectors)


def weighted(
    context: Float[Array, "N L D"] | Float[Array, "N R L D"], weights: Any, sizes: tuple[int, int]
) -> tuple[Any, Float[Array, "N R _ _ _ _"] | None]:
    """Contexts and weights as the loop takes them: one prompt whose weight is 1 as if there were no weights.

    Args:
        sizes: numbers of layers and of evaluations.

    Raises:
        InputError: weights for one prompt alone, or of a shape that does not fit.
    """
    if context.ndim == 3:
        if weights is not None:
            raise InputError(
                f"context has shape {context.shape} and there are weights, expected (N, R, L, D): give it an axis for "
                "its prompts"
            )
        return context, None
    count, prompts = context.shape[:2]
    if prompts == 1 and (weights is None or (not isinstance(weights, jax.Array) and np.all(np.asarray(weights) == 1))):
        return context[:, 0], None
    found = jnp.full((1, prompts), 1 / prompts) if weights is None else jnp.asarray(weights, jnp.float32)
    found = found.reshape(*found.shape, *(1,) * (_AXES - found.ndim))
    fits = found.ndim == _AXES and all(
        length in (1, size) for length, size in zip(found.shape, (count, prompts, *sizes), strict=False)
    )
    if not fits:
        raise InputError(
            f"weights have shape {np.shape(weights)}, expected {(count, prompts, *sizes)} and two axes for places, "
            "each as long or 1: one value for each picture, prompt, layer and evaluation"
        )
    return context, jnp.broadcast_to(found, (count, prompts, *found.shape[2:]))
