"""Pictures that guide sampling: masks, pictures to start from, what ControlNets are shown; all (H, W, 3) in 8 bits."""

import importlib
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from sdipc_jax.errors import InputError

Pixels = UInt8[np.ndarray, "_ _ 3"]
Mask = Float32[np.ndarray, "H W"]

# How much the shapes of a mask and of what it belongs to may differ: a pixel of a small one.
_SHAPES_ALIKE = 0.03


def where_it_counts(mask: Pixels, name: str, size: tuple[int, int], grid: tuple[int, int]) -> Mask:
    """A mask's brightness on the latents' grid, 0 to 1.

    Args:
        size: of the results.
        grid: of their latents.

    Raises:
        InputError: it is black, or has another shape than the results.
    """
    _check_shape(mask, name, [size])
    small = np.asarray(_grey(mask).resize(grid[::-1], Image.Resampling.BOX), np.float32) / 255
    if not small.any():
        raise InputError(f"{name}: found a mask that is black, expected white where the picture counts: invert it")
    return small


def what_is_redone(mask: Pixels, name: str, size: tuple[int, int], picture: tuple[int, int]) -> Mask:
    """The brightness, 0 to 1, of the middle of a mask that has the results' shape.

    Args:
        size: of the results.
        picture: that of the picture that it belongs to.

    Raises:
        InputError: it is black, or has neither the shape of the results nor that of the picture.
    """
    _check_shape(mask, name, [size, picture])
    found = np.asarray(_grey(covering(mask, size)), np.float32) / 255
    if not (found >= 0.5).any():
        raise InputError(f"{name}: found a mask that is black, expected white where the picture is redone: invert it")
    return found


def covering(picture: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle of a picture that has this shape, at this size."""
    return np.asarray(ImageOps.fit(Image.fromarray(picture), size[::-1], Image.Resampling.LANCZOS))


def padded(picture: Pixels, size: tuple[int, int]) -> tuple[Pixels, Mask]:
    """The whole picture in the middle of grey, and 1 where the grey is.

    Raises:
        InputError: nothing is left to paint.
    """
    height, width = size
    whole = ImageOps.contain(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS)
    left, top = (width - whole.width) // 2, (height - whole.height) // 2
    if whole.size == (width, height):
        raise InputError(
            f"the picture has the shape of {height}x{width} already, expected one that leaves something to paint: "
            "choose another --height or --width, or leave --pad out"
        )
    canvas, outside = np.full((height, width, 3), 127, np.uint8), np.ones((height, width), np.float32)
    inside = slice(top, top + whole.height), slice(left, left + whole.width)
    canvas[inside], outside[inside] = np.asarray(whole), 0
    return canvas, outside


def as_shown(picture: Pixels, size: tuple[int, int], detector: str = "none") -> Pixels:
    """What a ControlNet is shown of a picture: all of it, whatever its shape, as diffusers does, or its edges.

    Raises:
        InputError: a detector that is not installed.
    """
    whole = Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(whole) if detector == "none" else find_edges(whole)


def find_edges(picture: Image.Image) -> Pixels:
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
    return np.repeat(255 * edges[..., None].astype(np.uint8), 3, axis=-1)


def _grey(picture: Pixels) -> Image.Image:
    return Image.fromarray(picture).convert("L")


def _check_shape(mask: Pixels, name: str, sizes: list[tuple[int, int]]) -> None:
    height, width = mask.shape[:2]
    if not any(abs(height * other[1] / (width * other[0]) - 1) <= _SHAPES_ALIKE for other in sizes):
        shapes = " or ".join(f"{height}x{width}" for height, width in dict.fromkeys(sizes))
        raise InputError(f"{name}: found a mask of {height}x{width}, expected the shape of {shapes}: cut it to that")
