"""Pictures that are there already, as Pillow's or as arrays, and pictures on their way to a folder."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdipc_jax.errors import InputError
from sdipc_jax.pictures.reading import Picture, decode_picture, read_picture
from sdipc_jax.pictures.sheets import save_png

# What a PNG can hold; other modes become RGB.
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_EXPECTED = "expected (height, width, 3), 8-bit or floats from 0 to 1"


def read_any(picture: Any, name: str = "the picture") -> Picture:
    """A picture from a file, from Pillow, or from an array (H, W, 3), 8-bit or of floats in [0, 1].

    Pillow's pictures are read as their files would be: upright, through their colour profile, on white.

    Args:
        name: what errors call one that has no file.

    Raises:
        InputError: it cannot be read, or is nothing of these.
    """
    if isinstance(picture, str | os.PathLike):
        return read_picture(Path(picture))
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(to_levels(picture, name))
    stream = io.BytesIO()
    image = picture if picture.mode in _MODES else picture.convert("RGB")
    image.save(stream, "PNG", compress_level=1, exif=picture.getexif())
    return decode_picture(stream.getvalue(), name)


def to_levels(picture: Any, name: str) -> np.ndarray:
    """A picture as 8-bit levels, (H, W, 3).

    Raises:
        InputError: it is no array of such a shape and such values.
    """
    if not hasattr(picture, "shape"):
        raise InputError(f"{name} is {type(picture).__name__}, expected a path, a Pillow picture or an array: give one")
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"{name} has shape {array.shape}, {_EXPECTED}: change its shape")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} has dtype {array.dtype}, {_EXPECTED}: convert it")
    if not ((array >= 0) & (array <= 1)).all():
        raise InputError(f"{name} has values from {array.min():g} to {array.max():g}, {_EXPECTED}: scale it")
    return np.round(array * 255).astype(np.uint8)


def save_pictures(pictures: Any, folder: str | Path, *, name: str = "picture") -> list[Path]:
    """Writes pictures as `folder/picture-000.png` and so on, over files of the same names.

    Args:
        pictures: (N, H, W, 3), as `generate` gives them, or one (H, W, 3): floats in [0, 1] or 8-bit levels.
        folder: made where it is missing.
        name: what the files are called before their numbers.

    Returns:
        The files.

    Raises:
        InputError: these are no pictures, or they cannot be written; nothing is written where one is none.
    """
    rows: Sequence[Any] = [pictures] if getattr(pictures, "ndim", 4) == 3 else list(pictures)
    levels = [to_levels(picture, f"picture {index}") for index, picture in enumerate(rows)]
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}, expected a folder to write to: choose another") from None
    files = [folder / f"{name}-{index:03d}.png" for index in range(len(levels))]
    for file, picture in zip(files, levels, strict=True):
        save_png(file, picture, {})
    return files
