"""Random views of pictures, as matrix products: cheap on every device and inside the compiled step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def random_views(
    pictures: Float[Array, "N S S 3"],
    may_flip: Bool[Array, " N"],
    key: Array,
    *,
    shift: float,
    zoom: float,
    background: float = 0.0,
    colour: float = 0.0,
) -> Float[Array, "N S S 3"]:
    """Shifts, scales, mirrors and recolours pictures on a white ground.

    Args:
        pictures: in [0, 1].
        may_flip: which of them mean the same in a mirror.
        shift: largest shift, as a share of the side.
        zoom: largest change of size, as a share; each axis also stretches by a quarter of it.
        background: share of the pictures whose white ground becomes a random light colour.
        colour: largest change of each channel's gain.
    """
    count, side = pictures.shape[:2]
    keys = jax.random.split(key, 8)
    flip = may_flip & jax.random.bernoulli(keys[0], 0.5, (count,))
    size = 1 + jax.random.uniform(keys[1], (count, 1), minval=-zoom, maxval=zoom)
    size = size * (1 + jax.random.uniform(keys[2], (count, 2), minval=-zoom / 4, maxval=zoom / 4))
    moved = jax.random.uniform(keys[3], (count, 2), minval=-shift, maxval=shift) * side
    rows = _resampling(size[:, 0], moved[:, 0], side)
    columns = _resampling(size[:, 1] * jnp.where(flip, -1, 1), moved[:, 1], side)
    # Ink instead of light, so that what comes in from outside the picture is white.
    ink = jnp.einsum("nyr,nrxc->nyxc", rows, 1 - pictures)
    ink = jnp.einsum("nxs,nysc->nyxc", columns, ink)
    gain = 1 + jax.random.uniform(keys[4], (count, 1, 1, 3), minval=-colour, maxval=colour)
    light = 1 - jnp.clip(ink * gain, 0, 1)
    # Multiplying tints the drawing too, as light of that colour would, and needs no mask.
    tint = jax.random.uniform(keys[5], (count, 1, 1, 3), minval=0.75)
    tinted = jax.random.bernoulli(keys[6], background, (count, 1, 1, 1))
    return light * jnp.where(tinted, tint, 1.0)


def _resampling(size: Float[Array, " N"], moved: Float[Array, " N"], side: int) -> Float[Array, "N S S"]:
    """Linear interpolation along one axis: output place y reads input place (y - middle - moved) / size + middle."""
    middle = (side - 1) / 2
    wanted = (jnp.arange(side) - middle - moved[:, None]) / size[:, None] + middle
    return jnp.maximum(0, 1 - jnp.abs(wanted[:, :, None] - jnp.arange(side)))
