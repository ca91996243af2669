"""What ControlNets are shown: options become a `Control` for each, read and checked before anything is loaded."""

import importlib
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from sdipc_jax.commands.settings import ControlNetSettings
from sdipc_jax.errors import InputError
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.records import Record
from sdipc_jax.sampling import Control
from sdipc_jax.settings import Defaults


def read_controls(settings: ControlNetSettings, values: Defaults) -> tuple[list[Control], Record]:
    """A control for each network, for all rows, and what the manifest says of their pictures.

    Raises:
        InputError: a picture that cannot be read, or a detector that is not installed.
    """
    controls, digests = [], []
    options = zip(*map(settings.each, ("control_scale", "control_start", "control_end")), strict=True)
    detectors = settings.each("control_detector")
    for path, detector, numbers in zip(settings.control_image, detectors, options, strict=True):
        picture = read_picture(path)
        digests.append(picture.sha256)
        # As diffusers does: the whole picture, whatever its shape.
        whole = Image.fromarray(picture.pixels).resize((values.width, values.height), Image.Resampling.LANCZOS)
        shown = np.asarray(whole, np.float32) / 255 if detector == "none" else find_edges(whole)
        controls.append(Control(shown[None], *numbers))
    return controls, {"control_sha256": digests} if digests else {}


def find_edges(picture: Image.Image) -> Float32[np.ndarray, "H W 3"]:
    """White edges on black (Canny 1986), with scikit-image's thresholds.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        feature: Any = importlib.import_module("skimage.feature")
    except ImportError:
        raise InputError(
            "found the detector canny, expected the package scikit-image, which has it: pip install 'sdipc-jax[canny]'"
        ) from None
    edges = feature.canny(np.asarray(picture.convert("L"), np.float32) / 255)
    return np.repeat(edges[..., None], 3, axis=-1).astype(np.float32)
