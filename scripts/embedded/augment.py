"""Random views of pictures, inside the compiled step."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float


def random_views(
    pictures: Float[Array, "N S S 3"],
    may_flip: Bool[Array, " N"],
    key: Array,
    *,
    shift: float,
    zoom: float,
    turn: float = 0.0,
    bend: float = 0.0,
    background: float = 0.0,
    colour: float = 0.0,
    cover: float = 0.0,
) -> Float[Array, "N S S 3"]:
    """Moves, scales, turns, bends, mirrors and recolours pictures on a white ground.

    Args:
        pictures: in [0, 1].
        may_flip: which of them mean the same in a mirror.
        shift: largest shift, as a share of the side.
        zoom: largest change of size, as a share; each axis also stretches by half of it.
        turn: standard deviation of the angle, in radians.
        bend: standard deviation of a smooth displacement, as a share of the side: artists differ in proportions.
        background: share of the pictures whose white ground becomes a random light colour.
        colour: largest change of each channel's gain; half of it mixes channels.
        cover: share of the pictures of which a rectangle, up to half as wide and high, is white.
    """
    count, side = pictures.shape[:2]
    keys = jax.random.split(key, 13)
    size = 1 + jax.random.uniform(keys[0], (count, 1), minval=-zoom, maxval=zoom)
    size = size * (1 + jax.random.uniform(keys[1], (count, 2), minval=-zoom / 2, maxval=zoom / 2))
    mirrored = may_flip & jax.random.bernoulli(keys[2], 0.5, (count,))
    moved = jax.random.uniform(keys[3], (count, 2), minval=-shift, maxval=shift)
    angle = turn * jax.random.normal(keys[4], (count,))
    # Four by four displacements, smooth between.
    bends = bend * jax.random.normal(keys[5], (count, 4, 4, 2))
    bends = jax.image.resize(bends, (count, side, side, 2), "cubic")

    def view(picture: Array, size: Array, mirrored: Array, moved: Array, angle: Array, bends: Array) -> Array:
        at = (jnp.arange(side) - (side - 1) / 2) / side
        y, x = jnp.meshgrid(at, at, indexing="ij")
        wanted = jnp.stack([y, x], axis=-1) - moved + bends
        turned = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        wanted = wanted @ turned / size * jnp.where(jnp.array([False, True]) & mirrored, -1.0, 1.0)
        places = wanted * side + (side - 1) / 2
        sample = partial(map_coordinates, coordinates=[places[..., 0], places[..., 1]], order=1, cval=1.0)
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(picture)

    seen = jax.vmap(view)(pictures, size, mirrored, moved, angle, bends)
    mix = jnp.eye(3) * (1 + jax.random.uniform(keys[6], (count, 1, 3), minval=-colour, maxval=colour))
    mix = mix + colour / 2 * jax.random.uniform(keys[9], (count, 3, 3), minval=-1) * (1 - jnp.eye(3))
    # Of ink instead of light, so that white stays white.
    light = 1 - jnp.clip(jnp.einsum("nyxc,ncd->nyxd", 1 - seen, mix), 0, 1)
    corner = jax.random.uniform(keys[10], (count, 2), minval=-0.25)
    extent = jax.random.uniform(keys[11], (count, 2), maxval=0.5)
    at = jnp.arange(side) / side
    rows, columns = ((at >= corner[:, axis, None]) & (at < (corner + extent)[:, axis, None]) for axis in (0, 1))
    covered = rows[:, :, None] & columns[:, None] & jax.random.bernoulli(keys[12], cover, (count, 1, 1))
    light = jnp.where(covered[..., None], 1.0, light)
    # Multiplying tints the drawing too, as light of that colour would, and needs no mask.
    tint = jax.random.uniform(keys[7], (count, 1, 1, 3), minval=0.75)
    tinted = jax.random.bernoulli(keys[8], background, (count, 1, 1, 1))
    return light * jnp.where(tinted, tint, 1.0)


def mixed(pictures: Float[Array, "N S S 3"], key: Array) -> tuple[Float[Array, "N S S 3"], Float[Array, " N"]]:
    """Every second picture laid over another: a weighted mean of the two with a random weight (Zhang et al. 2018).

    Returns the pictures, and how much of each is its partner.
    """
    count = len(pictures)
    weight = jax.random.uniform(key, (count,)) * (jnp.arange(count) % 2)
    return with_partners(pictures, weight), weight


def with_partners(rows: Float[Array, "N ..."], weight: Float[Array, " N"]) -> Float[Array, "N ..."]:
    """Each row's weighted mean with its partner in `mixed`."""
    shape = (len(rows), *(1,) * (rows.ndim - 1))
    return (1 - weight).reshape(shape) * rows + weight.reshape(shape) * jnp.roll(rows, len(rows) // 2, axis=0)
