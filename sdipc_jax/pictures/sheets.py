"""Pictures on their way out: contact sheets, and PNG files that know how they were made."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.pictures.parameters import parameters
from sdipc_jax.pictures.reading import read_bytes

_KEYWORD = "sdipc"
_MARGIN = 8
_LABEL_HEIGHT = 22
_LABEL_SIZE = 13
_LONGEST_LABEL = 300
_LABEL_COLOUR = (70, 70, 70)
_SMALLEST_CELL = 32
_SHEET_PIXELS = 40_000_000


def contact_sheet(
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]], labels: Sequence[str] | None = None, *, cell: int = 256
) -> Image.Image:
    """Pictures in rows on white.

    Pictures larger than a cell are scaled down to fit it; smaller ones are enlarged by the largest whole factor that
    fits, each pixel a square, so that they are shown as they are.

    Args:
        rows: may differ in length.
        labels: a short text above each row; cut off at the sheet's edge.
        cell: the longest side of a picture on the sheet; less where there are so many that the sheet would be huge.
    """
    columns = max(map(len, rows), default=0)
    room = _SHEET_PIXELS / max(1, columns * len(rows))
    cell = min(cell, max(_SMALLEST_CELL, math.isqrt(int(room))))
    cells = [[_fit(picture, cell) for picture in row] for row in rows]
    widths = [max(row[column].width for row in cells if column < len(row)) for column in range(columns)]
    heights = [max((image.height for image in row), default=0) for row in cells]
    label_height = _LABEL_HEIGHT if labels is not None else 0
    size = (sum(width + _MARGIN for width in widths), sum(label_height + height + _MARGIN for height in heights))
    sheet = Image.new("RGB", (size[0] + _MARGIN, size[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(_font(), _LABEL_SIZE)
    top = _MARGIN
    for row, height, label in zip(cells, heights, labels or [""] * len(cells), strict=True):
        draw.text((_MARGIN, top), _shortened(label, font, sheet.width - 2 * _MARGIN), _LABEL_COLOUR, font)
        top += label_height
        left = _MARGIN
        for image, width in zip(row, widths, strict=False):
            sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
            left += width + _MARGIN
        top += height + _MARGIN
    return sheet


def thumbnail(pixels: UInt8[np.ndarray, "_ _ 3"], side: int = 256) -> UInt8[np.ndarray, "_ _ 3"]:
    """A picture no larger than a sheet shows it, so that many inputs can be kept."""
    if max(pixels.shape) <= side:
        return pixels
    return np.asarray(_fit(pixels, side))


def mark_middle(pixels: UInt8[np.ndarray, "H W 3"], rows: float, columns: float) -> UInt8[np.ndarray, "H W 3"]:
    """A picture with a frame around its middle: these shares of its height and width."""
    image = Image.fromarray(pixels)
    (height, width), draw = pixels.shape[:2], ImageDraw.Draw(image)
    top, left = round(height * (1 - rows) / 2), round(width * (1 - columns) / 2)
    box = (left, top, width - 1 - left, height - 1 - top)
    # Two lines, one of which can be seen on any ground.
    draw.rectangle(box, outline="white", width=2)
    draw.rectangle(box, outline="black", width=1)
    return np.asarray(image)


def png_text(record: Mapping[str, Any], height: int, width: int) -> PngInfo:
    """The text chunks of a picture with the settings in its record as other programs read them."""
    text = PngInfo()
    told = parameters(record, height, width)
    if told is not None:
        text.add_text("parameters", told.encode(errors="replace").decode())
    return text


def save_png(path: Path, pixels: UInt8[np.ndarray, "H W 3"], metadata: Mapping[str, Any]) -> None:
    """Writes a PNG with `metadata` as JSON in a text chunk, and the settings in it as other programs read them.

    The file is whole or not there at all.

    Raises:
        InputError: it cannot be written.
    """
    text = png_text(metadata, *pixels.shape[:2])
    # Escaped to ASCII: file names from a disk need not be valid Unicode, but come back as they were.
    text.add_itxt(_KEYWORD, json.dumps(metadata, allow_nan=False))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", pnginfo=text)
    write_atomically(path, stream.getvalue())


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote.

    Raises:
        InputError: the file cannot be read, is no PNG, or has no such metadata.
    """
    data = read_bytes(path)
    try:
        metadata = json.loads(PngImageFile(io.BytesIO(data)).info[_KEYWORD])
        if not isinstance(metadata, dict):
            raise TypeError
    except Exception:  # Whatever Pillow raises: for some bytes that is almost anything.
        raise InputError(
            f"{printable(path)}: found no readable sdipc record, expected a PNG as sdipc wrote it: "
            "look in manifest.jsonl beside the original"
        ) from None
    return metadata


def _font() -> Path:
    """Matplotlib's, since Pillow's own has no accents; found without the import, which takes a seventh of a second."""
    found: Any = find_spec("matplotlib")
    return Path(found.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf"


def _fit(picture: UInt8[np.ndarray, "_ _ 3"], cell: int) -> Image.Image:
    image = Image.fromarray(picture)
    longest = max(image.size)
    if longest > cell:
        width, height = (max(1, round(side * cell / longest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _shortened(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The label on one line, cut to a width in pixels."""
    label = "".join(letter if letter.isprintable() else " " for letter in label[:_LONGEST_LABEL])
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "…") > width:
        label = label[:-1]
    return label.rstrip() + "…"
