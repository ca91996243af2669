"""The one table of picture formats: told by content, opened by a decoder of its own."""

import importlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sdipc_jax.errors import MissingPackageError

Decoder = Callable[[io.BytesIO], ImageFile]

READ = "JPEG, PNG, WebP, GIF, BMP or AVIF"


class _FirstFrame(GifImageFile):
    """A GIF whose first frame is shown alone: Pillow's own takes memory for what comes after it when it is opened."""

    disposal_method = property(lambda self: 0, lambda self, value: None)


def _open_heif(stream: io.BytesIO) -> ImageFile:
    try:
        package: Any = importlib.import_module("pillow_heif")
    except ImportError:
        raise MissingPackageError(
            "found a HEIC file, expected the package pillow-heif, which reads it: pip install 'sdipc-jax[heic]', or "
            "convert it to PNG"
        ) from None
    opened: ImageFile = package.HeifImageFile(stream)
    return opened


@dataclass(frozen=True)
class Format:
    """A kind of file that people take for a picture.

    Attributes:
        name: as messages have it.
        start: what its first bytes look like.
        decoder: opens it, and nothing else; None for what is refused by its name.
        endings: those that its files usually have, in lower case.
    """

    name: str
    start: bytes
    decoder: Decoder | None
    endings: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'an' if self.name[0] in 'AES' else 'a'} {self.name} file"


# Decoders are called directly: nothing else in Pillow can be reached, whatever plugins are installed. TIFF and the
# formats after it have a long record of faults in their decoders, or can hold anything, and stay refused.
FORMATS = (
    Format("JPEG", rb"\xff\xd8\xff", JpegImageFile, (".jpg", ".jpeg", ".jpe", ".jfif")),
    Format("PNG", rb"\x89PNG\r\n\x1a\n", PngImageFile, (".png", ".apng")),
    Format("WebP", rb"RIFF....WEBP", WebPImageFile, (".webp",)),
    Format("GIF", rb"GIF8[79]a", _FirstFrame, (".gif",)),
    Format("BMP", rb"BM.{12}[\x0c-\x80]\0\0\0", BmpImageFile, (".bmp", ".dib")),
    # The brand may stand among those that a file says it is compatible with.
    Format("AVIF", rb"....ftyp(?:m[is]f1....(?:....){0,8}?)?avi[fs]", AvifImageFile, (".avif", ".avifs")),
    Format("HEIC", rb"....ftyp(?:he[iv]|m[is]f1)", _open_heif, (".heic", ".heif", ".hif")),
    Format("TIFF", rb"II[*+]\0|MM\0[*+]", None, (".tif", ".tiff")),
    Format("PSD", rb"8BPS", None, (".psd",)),
    Format("PDF", rb"%PDF", None, (".pdf",)),
    Format("EPS", rb"%!PS", None, (".eps", ".ps")),
    Format("FITS", rb"SIMPLE  =", None, (".fits", ".fit")),
    Format("JPEG 2000", rb"....jP  |\xff\x4f\xff\x51", None, (".jp2", ".j2k")),
    Format("JPEG XL", rb"....JXL |\xff\x0a", None, (".jxl",)),
    Format("SVG, XML or HTML", rb"(?:\xef\xbb\xbf)?\s*<", None, (".svg",)),
)


def identify(data: bytes) -> Format | None:
    """The format of a file, by its content: a hundred bytes of it are enough. None for what is no picture.

    >>> identify(b"GIF89a...").name
    'GIF'
    """
    return next((each for each in FORMATS if re.match(each.start, data, re.DOTALL)), None)
