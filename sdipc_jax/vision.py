"""Pictures to CLIP features."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from sdipc_jax.bundle import Bundle, apply
from sdipc_jax.errors import InputError
from sdipc_jax.images import preprocess, read_picture


def read_pictures(bundle: Bundle, paths: Sequence[str | Path]) -> Float32[np.ndarray, "N S S 3"]:
    """Reads pictures and prepares them for the vision tower.

    Args:
        paths: JPEG, PNG or WebP files.

    Raises:
        InputError: a picture cannot be read, or none is named; `sdipc vary` shows how to go on with the others.
    """
    if isinstance(paths, str | Path) or not paths:
        raise InputError(f"paths is {paths!r}, expected a list of at least one file")
    settings = bundle.config.vision_side.preprocessing
    return np.stack([preprocess(read_picture(Path(path)).pixels, settings) for path in paths])


@jax.jit
def encode_images(bundle: Bundle, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N D_image"]:
    """The class token of each picture after the vision tower's last norm, float32.

    Args:
        pixels: preprocessed pictures, as `read_pictures` gives them.
    """
    clip = bundle.params["clip"]
    params = {name: clip[name] for name in ("vision_model", "deep_prompts") if name in clip}
    return apply(bundle.config.vision_model, params, pixels).astype(jnp.float32)
