"""Pictures to CLIP features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from sdipc_jax.batches import in_equal_parts
from sdipc_jax.checkpoints.bundle import Bundle, apply, with_fit
from sdipc_jax.errors import InputError
from sdipc_jax.executables import kept_program
from sdipc_jax.pictures.handed import read_any
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.prompts.prompt import check_axes
from sdipc_jax.settings import Fit
from sdipc_jax.tracing import platform

# Pictures that a CPU encodes at once. With more, layers need memory that is new to the process, which takes longer.
_AT_ONCE = 8


def read_pictures(bundle: Bundle, paths: Sequence[Any], fit: Fit = "crop") -> Float32[np.ndarray, "N S S 3"]:
    """Reads pictures and prepares them for the vision tower.

    Args:
        paths: picture files, or in their place Pillow's pictures or arrays (H, W, 3), 8-bit or of floats in [0, 1].
        fit: what the tower sees of a picture that is not square: its middle, or all of it, with bars or out of
            proportion.

    Raises:
        InputError: a picture cannot be read, or none is named; `sdipc vary` shows how to go on with the others.
    """
    if isinstance(paths, str | Path) or not len(paths):
        raise InputError(f"paths is {paths!r}, expected a list of at least one file: put it in brackets")
    settings = with_fit(bundle.config, fit).vision_side.preprocessing
    return np.stack([preprocess(read_any(picture, f"picture {n}").pixels, settings) for n, picture in enumerate(paths)])


@kept_program()
def encode_images(bundle: Bundle, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N D_image"]:
    """The class token of each picture after the vision tower's last norm, float32.

    Args:
        pixels: preprocessed pictures, as `read_pictures` gives them.

    Raises:
        InputError: an axis is missing.
    """
    check_axes("pixels", pixels, ("N", "S", "S", "3"), most=4)
    clip = bundle.params["clip"]
    params = {name: clip[name] for name in ("vision_model", "deep_prompts") if name in clip}

    def encode(pixels: Float[Array, "N S S 3"]) -> Float[Array, "N D_image"]:
        return apply(bundle.config.vision_model, params, pixels).astype(jnp.float32)

    count = len(pixels)
    if platform() != "cpu" or count <= _AT_ONCE:
        return encode(pixels)
    features = jax.lax.map(encode, in_equal_parts(pixels, _AT_ONCE))
    return features.reshape(-1, features.shape[-1])[:count]
