"""Reading picture files that may be hostile, into upright sRGB on white."""

import hashlib
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.PngImagePlugin import PngImageFile

from sdipc_jax.errors import InputError, MissingPackageError, one_line, printable, shortened
from sdipc_jax.pictures.formats import READ, Decoder, identify
from sdipc_jax.pictures.jpeg import count_scans, damage
from sdipc_jax.pictures.png import CHUNKS, without_chunks

MAX_BYTES = 200_000_000
MAX_PIXELS = 50_000_000
# Ten scans are usual.
MAX_SCANNED_PIXELS = 5_000_000_000
MIN_SIDE = 16
MAX_ASPECT = 200
NOTED_ASPECT = 20
MAX_PROFILE_BYTES = 4 * 2**20
# Pillow unpacks these in Python, a run at a time.
MAX_RUN_LENGTH_PIXELS = 4_000_000

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was read.

    Attributes:
        pixels: 8-bit sRGB, upright, on white where it was transparent.
        sha256: of the file's bytes, those that were decoded.
        format: `JPEG` or another name in `formats.FORMATS`, by content.
        notes: what a person may want to know, such as "an animation: its first frame is used".
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    sha256: str
    format: str
    notes: tuple[str, ...] = ()


def read_picture(path: str | Path) -> Picture:
    """Reads a JPEG, PNG, WebP, GIF, BMP or AVIF file, or HEIC with the extra of that name.

    The file's name plays no part; its metadata is not kept; of an animation the first frame is used.

    Limits: 200 MB, 50 megapixels (checked before anything is decoded), sides of at least 16 pixels, 200:1.

    Raises:
        InputError: the file cannot be read, is of another kind or damaged, or goes beyond the limits.
    """
    return decode_picture(read_bytes(path), path)


def decode_picture(data: bytes, path: str | Path) -> Picture:
    """`read_picture` for bytes that are there already; `path` is what errors call them."""
    name = printable(path)
    kind, decoder = _identify(name, data)
    notes: list[str] = []
    try:
        upright = _decode_png(name, data, notes) if kind == "PNG" else _open_and_decode(name, data, decoder, notes)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "over a hundred") from None
    except Exception as error:  # Whatever the decoders raise: for some bytes that is almost anything.
        reason = shortened(one_line(error) or type(error).__name__)
        raise InputError(
            f"{name}: found a damaged {kind} file ({reason}), expected a whole one: get it again or save it anew"
        ) from None
    if max(upright.size) > NOTED_ASPECT * min(upright.size):
        notes.append(f"longer than {NOTED_ASPECT}:1")
    if all(low == high for low, high in cast(Any, upright.getextrema())):
        notes.append("all pixels have the same colour")
    return Picture(np.asarray(upright), hashlib.sha256(data).hexdigest(), kind, tuple(notes))


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file of at most 200 MB.

    Raises:
        InputError: there is none, it is empty or too large, or it cannot be read.
    """
    name = printable(path)
    try:
        # A device or a pipe could block for ever on opening.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{name}: found a folder or a device, expected a file: name the file itself")
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1) if os.fstat(stream.fileno()).st_size <= MAX_BYTES else None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        # A Path has made one slash of two.
        if (address := re.match(r"([a-z][a-z0-9+.-]+):/+", name)) is not None:
            raise InputError(
                f"{address[1]}://{name[address.end() :]}: found an address, expected a file: fetch it first"
            ) from error
        raise InputError(
            f"{name}: {reason}, expected a file that can be read: check the path and its rights"
        ) from error
    if data is None or len(data) > MAX_BYTES:
        raise InputError(f"{name}: found more than {MAX_BYTES // 10**6} MB, expected a picture: scale it down")
    if not data:
        raise InputError(f"{name}: found an empty file, expected a picture: get it again")
    return data


def _identify(name: str, data: bytes) -> tuple[str, Decoder]:
    found = identify(data)
    if found is None or found.decoder is None:
        raise InputError(
            f"{name}: found {found or 'an unknown kind of file'}, expected {READ} content: convert it to PNG"
        )
    return found.name, found.decoder


def _open_and_decode(name: str, data: bytes, decoder: Decoder, notes: list[str]) -> Image.Image:
    try:
        image = decoder(io.BytesIO(data))
    except MissingPackageError as error:
        raise InputError(f"{name}: {error}") from None
    _check_size(name, *image.size)
    if image.format == "JPEG":
        _check_scans(name, data, *image.size)
    if image.format in ("BMP", "DIB") and image.tile[0].codec_name == "bmp_rle":
        _check_run_lengths(name, *image.size)
    upright = _decode(name, image, notes)
    if image.format == "JPEG" and (problem := damage(data)):
        notes.append(problem)
    return upright


def _decode_png(name: str, data: bytes, notes: list[str]) -> Image.Image:
    """Without the texts or the colour profile where these are larger than Pillow unpacks: pixels do not need them."""
    for left_out in ((), ("text",), ("colour profile",), ("text", "colour profile")):
        rest = without_chunks(data, *(CHUNKS[each] for each in left_out))
        told = [f"its {each} is over a megabyte and was not used" for each in left_out]
        try:
            upright = _open_and_decode(name, rest, PngImageFile, told)
            # Decoding does not look at the checksums of the pixels' chunks; this does, but cannot decode after.
            PngImageFile(io.BytesIO(rest)).verify()
        except InputError:
            raise
        except ValueError as error:
            problem = error
        else:
            notes += told
            return upright
    raise problem


def _check_size(name: str, width: int, height: int) -> None:
    """Refuses by the header alone."""
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}x{height} = {width * height / 1e6:.1f}")
    size = f"{name}: found {width}x{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{size}, expected sides of at least {MIN_SIDE}: use a larger picture")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{size}, expected at most {MAX_ASPECT}:1: cut out the part that matters")


def _check_scans(name: str, data: bytes, width: int, height: int) -> None:
    """Refuses a JPEG that goes over its pixels again and again: each scan costs time and hardly any bytes."""
    scans = count_scans(data)
    if scans * width * height > MAX_SCANNED_PIXELS:
        raise InputError(
            f"{name}: found {scans} JPEG scans of {width}x{height} pixels, "
            f"expected at most {MAX_SCANNED_PIXELS // (width * height)}: save it anew"
        )


def _check_run_lengths(name: str, width: int, height: int) -> None:
    if width * height > MAX_RUN_LENGTH_PIXELS:
        raise InputError(
            f"{name}: found a BMP with run lengths of {width}x{height} pixels, expected at most "
            f"{MAX_RUN_LENGTH_PIXELS // 10**6} megapixels of that kind: save it as PNG"
        )


def _too_large(name: str, megapixels: str) -> InputError:
    return InputError(
        f"{name}: found {megapixels} megapixels, expected at most {MAX_PIXELS // 10**6}: scale the picture down"
    )


def _decode(name: str, image: ImageFile.ImageFile, notes: list[str]) -> Image.Image:
    """The upright sRGB picture; notes are added to the list."""
    if getattr(image, "is_animated", False):
        notes.append("an animation: its first frame is used")
    rawmode = image.tile[0].args if image.format == "PNG" else None
    image.load()
    flat, alpha = _split_alpha(name, image, rawmode)
    flat = _to_srgb(flat, image.info.get("icc_profile"), notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes.append("transparent: shown on white")
        white = Image.new("RGB", flat.size, "white")
        white.paste(flat, mask=alpha)
        flat = white
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Parses bytes that no checksum need cover.
        notes.append("its EXIF data is damaged: the picture may lie on its side")
        orientation = 1
    return flat.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else flat


def _split_alpha(name: str, image: Image.Image, rawmode: Any) -> tuple[Image.Image, Image.Image | None]:
    """The colours, 8-bit of mode L, RGB or CMYK, and the alpha channel if there is any transparency.

    Pillow reduces 16-bit colour to its high byte, so 16-bit grey is reduced in the same way; `convert` would clip it.
    It also leaves a transparent colour in the file's bit depth while it scales the pixels, hence `rawmode`, the
    layout of the pixels in a PNG file.
    """
    key = image.info.get("transparency")
    if image.mode == "P":
        image, key = image.convert("RGB" if key is None else "RGBA"), None
    if image.mode in ("RGBA", "LA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode == "1":
        image = image.convert("L")
    alpha = None
    if key is not None:
        if rawmode == "RGB;16B":
            raise InputError(
                f"{name}: found 16-bit colour with a transparent colour, expected an alpha channel: "
                "save it as 8-bit or with alpha"
            )
        depth = {"L;2": 2, "L;4": 4, "I;16B": 16}.get(rawmode, 8)
        largest = 2**depth - 1
        levels = np.asarray(image)
        same = levels == (np.asarray(key) & largest) * (max(largest, 255) // largest)
        alpha = Image.fromarray(np.where(same.all(-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image, alpha


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Colours through the ICC profile, where the file has one."""
    if not profile:
        if image.mode == "CMYK":
            notes.append("CMYK without a colour profile: colours are approximate")
        return image.convert("RGB")
    if len(profile) > MAX_PROFILE_BYTES:
        notes.append(f"its colour profile of {len(profile)} bytes is too large and was not used")
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space == "RGB " and image.mode == "L":
            image = image.convert("RGB")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            image.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if _is_identity(transform, image.mode):
            return image.convert("RGB")
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append("its colour profile does not fit the picture and was not used")
        return image.convert("RGB")
    assert converted is not None  # Only with inPlace=True.
    return converted


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether no colour moves by more than rounding: such pixels stay as they are, to the bit.

    The many pictures with an sRGB profile then have the same pixels as in programs that ignore profiles.
    """
    if mode == "CMYK":
        return False
    ramp = np.linspace(0, 255, 18).astype(np.uint8)
    grid = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(18, -1, 3)
    sample = Image.fromarray(grid).convert(mode)
    moved = ImageCms.applyTransform(sample, transform)
    return bool(np.abs(np.asarray(moved, np.int16) - np.asarray(sample.convert("RGB"), np.int16)).max() <= 2)
