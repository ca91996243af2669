"""The safety checker on pictures that have not left the device."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from sdipc_jax.checkpoints.bundle import Params, SafetySide, apply
from sdipc_jax.models import StableDiffusionSafetyChecker
from sdipc_jax.pictures.preprocessing import Preprocessing

# Pillow's weights are whole numbers of this many bits.
_WEIGHT_BITS = 22


def flag_pictures(side: SafetySide, params: Params, pictures: Float[Array, "N H W 3"]) -> Bool[Array, " N"]:
    """Which pictures in [0, 1] the checkpoint's safety checker flags."""
    pixels = preprocess_on_device(jnp.round(pictures * 255), side.preprocessing)
    return apply(StableDiffusionSafetyChecker(side.vision), params, pixels)


def preprocess_on_device(levels: Float[Array, "N H W 3"], settings: Preprocessing) -> Float[Array, "N S S 3"]:
    """`pictures.preprocessing.preprocess` on the device, so that a picture is flagged here when it is flagged there."""
    height, width = settings.resized(levels.shape[1], levels.shape[2])
    levels = levels.astype(jnp.int32)
    for axis, side in ((2, width), (1, height)):
        if side != levels.shape[axis]:
            sums = jnp.tensordot(levels, _bicubic_weights(levels.shape[axis], side), axes=(axis, 1))
            # Rounded to 8 bits after each of the two passes.
            levels = jnp.clip((jnp.moveaxis(sums, -1, axis) + (1 << _WEIGHT_BITS - 1)) >> _WEIGHT_BITS, 0, 255)
    if settings.do_center_crop:
        (height, width), (crop_height, crop_width) = levels.shape[1:3], settings.crop_size
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        levels = levels[:, top : top + crop_height, left : left + crop_width]
    mean, std = jnp.array(settings.image_mean), jnp.array(settings.image_std)
    return (levels * settings.rescale_factor - mean) / std


def _bicubic_weights(before: int, after: int) -> Int32[np.ndarray, "after before"]:
    """Pillow's weights for resizing one axis, in its fixed-point form (Keys 1981, with a = -1/2)."""
    scale = before / after
    centres = (np.arange(after)[:, None] + 0.5) * scale
    x = np.abs((np.arange(before) + 0.5 - centres) / max(scale, 1))
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.trunc(weights * (1 << _WEIGHT_BITS) + np.copysign(0.5, weights)).astype(np.int32)
