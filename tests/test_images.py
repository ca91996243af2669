"""Pictures that are damaged, hostile or just unusual, made here byte by byte; and CLIP preprocessing."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from sdipc_jax.errors import InputError
from sdipc_jax.pictures import reading as images
from sdipc_jax.pictures.preprocessing import Preprocessing, preprocess
from sdipc_jax.pictures.reading import MAX_BYTES, Picture, read_picture

GOLDEN = Path(__file__).parent / "golden"
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Picture]:
    """Reads bytes through a file whose name says nothing about them."""

    def read_bytes(data: bytes) -> Picture:
        (tmp_path / "file.jpg").write_bytes(data)
        return read_picture(tmp_path / "file.jpg")

    return read_bytes


def photo(height: int = 32, width: int = 48) -> np.ndarray:
    """Smooth, asymmetric, and different in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + 2 * y) % 256], axis=-1).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG with `extra` chunks before the pixels; `rows` without filter bytes."""
    step = max(1, len(rows) // max(1, height))
    filtered = b"".join(b"\0" + rows[start : start + step] for start in range(0, len(rows), step))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(filtered))
    return SIGNATURE + chunk(b"IHDR", header) + body + chunk(b"IEND")


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(SIGNATURE)
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


# Files that are read.


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WebP", {"lossless": True}), ("JPEG", {"quality": 95})])
def test_pixels_format_and_digest(read: Callable[[bytes], Picture], kind: str, options: dict[str, Any]) -> None:
    data = encode(photo(), kind, **options)
    picture = read(data)
    assert picture.format == kind
    assert picture.notes == ()
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert picture.pixels.dtype == np.uint8
    assert np.abs(picture.pixels.astype(int) - photo()).mean() < (3 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WebP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_every_exif_orientation_gives_the_same_picture(
    read: Callable[[bytes], Picture], kind: str, options: dict[str, Any]
) -> None:
    upright = photo(32, 48)
    across, down, both = upright[:, ::-1], upright[::-1], upright[::-1, ::-1]
    # The standard says which side of the scene the first row and the first column are: 6 is right and top.
    stored = [upright, across, both, down] + [one.transpose(1, 0, 2) for one in (upright, across, both, down)]
    for orientation, pixels in enumerate(stored, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = read(encode(np.ascontiguousarray(pixels), kind, exif=exif, **options)).pixels
        assert found.shape == upright.shape
        assert np.abs(found.astype(int) - upright).mean() < (2 if kind == "JPEG" else 1e-9)


def test_damaged_exif_is_noted(read: Callable[[bytes], Picture]) -> None:
    picture = read(encode(photo(), exif=b"Exif\0\0nonsense"))
    assert picture.notes == ("its EXIF data is damaged: the picture may lie on its side",)
    np.testing.assert_array_equal(picture.pixels, photo())


@pytest.mark.parametrize("channels, colour", [(1, 0), (3, 2), (2, 4), (4, 6)], ids=["grey", "RGB", "LA", "RGBA"])
def test_16_bit_ramps_are_scaled(read: Callable[[bytes], Picture], channels: int, colour: int) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    levels = np.stack([ramp] * channels, axis=-1)
    if colour >= 4:
        levels[..., -1] = 65535
    picture = read(png(64, 64, 16, colour, levels.astype(">u2").tobytes()))
    assert abs(picture.pixels.mean() - 127.5) < 0.5
    assert np.abs(picture.pixels - ramp[..., None] / 257).max() < 1
    assert picture.notes == ()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_shallow_grey_fills_the_range(read: Callable[[bytes], Picture], depth: int) -> None:
    bits = np.unpackbits(np.arange(32, dtype=np.uint8).repeat(16))
    pixels = read(png(32 * 16 * 8 // depth // 16, 16, depth, 0, np.packbits(bits).tobytes())).pixels
    levels = bits.reshape(-1, depth) @ (1 << np.arange(depth)[::-1]) * 255 // (2**depth - 1)
    np.testing.assert_array_equal(pixels[..., 0].ravel(), levels)


HIDDEN, SHOWN = 2, 1  # Indices of the pixels of a transparent and an opaque colour.


def transparent_pictures() -> Iterator[tuple[str, bytes, int]]:
    """Files with columns that alternate between an opaque and a transparent colour; (name, file, opaque level)."""
    columns = np.arange(16) % 2 == 0
    flags = np.tile(columns, (16, 1))
    for depth in (1, 2, 4, 8, 16):
        shown, hidden = 0, 1
        levels = np.where(flags, shown, hidden).astype(np.uint16)
        bits = (levels[..., None] >> np.arange(depth)[::-1] & 1).astype(np.uint8)
        rows = np.packbits(bits.reshape(16, -1), axis=-1).tobytes()
        yield f"grey{depth}+tRNS", png(16, 16, depth, 0, rows, chunk(b"tRNS", struct.pack(">H", hidden))), 0
    grey = np.where(flags, 60, 200).astype(np.uint8)
    alpha = np.where(flags, 255, 0).astype(np.uint8)
    rgb = np.stack([grey] * 3, axis=-1)
    rgb[~flags, 0] = 9
    yield "RGB+tRNS", png(16, 16, 8, 2, rgb.tobytes(), chunk(b"tRNS", struct.pack(">HHH", 9, 200, 200))), 60
    indices = np.where(flags, SHOWN, HIDDEN).astype(np.uint8).tobytes()
    palette = chunk(b"PLTE", bytes([0] * 3 + [60] * 3 + [200] * 3))
    yield "P+tRNS one", png(16, 16, 8, 3, indices, palette, chunk(b"tRNS", b"\xff\xff\0")), 60
    yield "P+tRNS many", png(16, 16, 8, 3, indices, palette, chunk(b"tRNS", b"\x80\xff\0")), 60
    yield "LA", encode(np.stack([grey, alpha], axis=-1)), 60
    rgba = np.stack([grey, grey, grey, alpha], axis=-1)
    yield "RGBA", encode(rgba), 60
    yield "WebP", encode(rgba, "WebP", lossless=True, exact=True), 60
    deep = np.where(np.stack([flags] * 4, axis=-1), 60 * 257, 200 * 257).astype(">u2")
    deep[..., 3] = np.where(flags, 65535, 0)
    yield "RGBA16", png(16, 16, 16, 6, deep.tobytes()), 60


@pytest.mark.parametrize("data, level", [pytest.param(*case, id=name) for name, *case in transparent_pictures()])
def test_hidden_colours_stay_hidden(read: Callable[[bytes], Picture], data: bytes, level: int) -> None:
    picture = read(data)
    assert (picture.pixels[:, ::2] == level).all()
    assert (picture.pixels[:, 1::2] == 255).all()
    assert picture.notes == ("transparent: shown on white",)


def test_half_transparent_is_mixed_with_white(read: Callable[[bytes], Picture]) -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, np.arange(16) * 17
    expected = (rgba[..., :3] * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:]).round()
    assert np.abs(read(encode(rgba)).pixels - expected).max() <= 1


def test_16_bit_transparent_colour_is_refused(read: Callable[[bytes], Picture]) -> None:
    data = png(16, 16, 16, 2, photo(16, 16).astype(">u2").tobytes(), chunk(b"tRNS", bytes(6)))
    with pytest.raises(InputError, match="16-bit colour with a transparent colour"):
        read(data)


# Colour.

SRGB_XYZ = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
P3_XYZ = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE_XYZ = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
D50 = np.array([0.9642, 1.0, 0.8249])


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def fixed(values: Any) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.4."""
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4xI", start + len(body), 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(D50)
    return header.ljust(128, b"\0") + table + body


def rgb_profile(to_xyz: np.ndarray, to_linear: Callable[[np.ndarray], np.ndarray]) -> bytes:
    curve = (to_linear(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2")
    trc = b"curv" + struct.pack(">4xI", len(curve)) + curve.tobytes()
    columns = {name: b"XYZ \0\0\0\0" + fixed(column) for name, column in zip((b"r", b"g", b"b"), to_xyz.T, strict=True)}
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(D50)}
    for name, column in columns.items():
        tags |= {name + b"XYZ": column, name + b"TRC": trc}
    return icc(b"mntr", b"RGB ", b"XYZ ", tags)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
@pytest.mark.parametrize(
    "to_xyz, to_linear",
    [(P3_XYZ, srgb_to_linear), (ADOBE_XYZ, lambda values: values ** (563 / 256))],
    ids=["display-p3", "adobe-rgb"],
)
def test_wide_profiles_to_srgb(
    read: Callable[[bytes], Picture], kind: str, to_xyz: np.ndarray, to_linear: Callable[[np.ndarray], np.ndarray]
) -> None:
    colours = np.array([[200, 120, 60], [60, 180, 90], [90, 80, 200], [128, 128, 128], [250, 250, 250], [20, 10, 5]])
    pixels = colours.astype(np.uint8).repeat(16, axis=0)[None].repeat(16, axis=0)
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WebP": {"lossless": True}}[kind]
    found = read(encode(pixels, kind, icc_profile=rgb_profile(to_xyz, to_linear), **options)).pixels
    linear = to_linear(colours / 255) @ to_xyz.T @ np.linalg.inv(SRGB_XYZ).T
    expected = (linear_to_srgb(linear) * 255)[None].repeat(16, axis=1).repeat(16, axis=0)
    assert np.abs(expected - pixels).max() > 10
    assert np.abs(found - expected).mean() < 1
    assert np.abs(found - expected).max() < 3


@pytest.mark.parametrize(
    "profile",
    [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), rgb_profile(SRGB_XYZ * 0.985, srgb_to_linear)],
    ids=["lcms", "rough"],
)
def test_srgb_profile_changes_no_bit(read: Callable[[bytes], Picture], profile: bytes) -> None:
    picture = read(encode(photo(), icc_profile=profile))
    np.testing.assert_array_equal(picture.pixels, photo())
    assert picture.notes == ()


def test_palette_and_grey_go_through_the_profile_too(read: Callable[[bytes], Picture]) -> None:
    profile = rgb_profile(ADOBE_XYZ, lambda values: values**1.0)
    level = np.full((16, 16, 3), 50, np.uint8)
    expected = linear_to_srgb(np.array(50 / 255)) * 255
    for image in (Image.fromarray(level).quantize(4), Image.fromarray(level).convert("L"), Image.fromarray(level)):
        assert np.abs(read(encode(image, icc_profile=profile)).pixels - expected).max() < 2


@pytest.mark.parametrize("profile", [b"nonsense", bytes(200), rgb_profile(P3_XYZ, srgb_to_linear)[:300]])
def test_unusable_profile_is_noted(read: Callable[[bytes], Picture], profile: bytes) -> None:
    picture = read(encode(photo(), icc_profile=profile))
    np.testing.assert_array_equal(picture.pixels, photo())
    assert picture.notes == ("its colour profile does not fit the picture and was not used",)


def inks() -> np.ndarray:
    """CMYK patches of 16x16: cyan, magenta, yellow, black, white and a mixture."""
    patches = np.array(
        [[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 0], [90, 20, 150, 60]]
    )
    return patches.astype(np.uint8).repeat(16, axis=0)[None].repeat(16, axis=0)


def as_ycck(cmyk: np.ndarray) -> bytes:
    """Adobe's other layout: YCbCr of the inks, inverted black, marked as transform 2."""
    ycc = np.asarray(Image.fromarray(np.ascontiguousarray(cmyk[..., :3])).convert("YCbCr"))
    planes = np.concatenate([ycc, 255 - cmyk[..., 3:]], axis=-1)
    # Pillow stores CMYK inverted.
    data = bytearray(encode(Image.fromarray(255 - planes, "CMYK"), "JPEG", quality=100, subsampling=0))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    return bytes(data)


@pytest.mark.parametrize("layout", ["CMYK", "YCCK"])
def test_inverted_cmyk_without_profile(read: Callable[[bytes], Picture], layout: str) -> None:
    cmyk = inks()
    data = as_ycck(cmyk) if layout == "YCCK" else encode(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)
    picture = read(data)
    expected = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    assert np.abs(picture.pixels - expected).mean() < 3
    assert picture.notes == ("CMYK without a colour profile: colours are approximate",)


def lut(inputs: int, outputs: int, table: bytes) -> bytes:
    """A profile's table with two points in each direction."""
    same = bytes(range(256))
    head = b"mft1\0\0\0\0" + bytes([inputs, outputs, 2, 0]) + fixed(np.eye(3).ravel())
    return head + same * inputs + table + same * outputs


def test_cmyk_profile(read: Callable[[bytes], Picture]) -> None:
    """A printer whose inks are far from the pure colours and whose black is grey."""
    black = (14, 0, 0)
    lab = {(1, 0, 0, 0): (55, -30, -40), (0, 1, 0, 0): (48, 60, -5), (0, 0, 1, 0): (85, -5, 70)}
    lab |= {(0, 0, 0, 1): black, (0, 0, 0, 0): (100, 0, 0)}
    grid = [lab.get((c, m, y, k), black) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    to_lab = b"".join(bytes([round(light * 2.55), a + 128, b + 128]) for light, a, b in grid)
    from_lab = bytes([0, 0, 0, 255]) * 4 + bytes(16)
    profile = icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut(4, 3, to_lab), b"B2A0": lut(3, 4, from_lab)})
    cmyk = np.ascontiguousarray(inks()[:, :80])
    picture = read(encode(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, icc_profile=profile))
    for patch, (light, a, b) in enumerate(lab.values()):
        xyz = lab_to_xyz(light, a, b)
        # The printer's black becomes black and white stays white.
        darkest = lab_to_xyz(*black)
        xyz = (xyz - darkest) * D50 / (D50 - darkest)
        expected = linear_to_srgb(np.linalg.inv(SRGB_XYZ) @ xyz) * 255
        pixels = picture.pixels[:, patch * 16 : patch * 16 + 16]
        assert np.abs(pixels.mean((0, 1)) - expected).mean() < 3
    assert picture.notes == ()


def lab_to_xyz(light: float, a: float, b: float) -> np.ndarray:
    fy = (light + 16) / 116
    roots = np.array([fy + a / 500, fy, fy - b / 200])
    return np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * D50


# Notes and animations.


def test_long_and_constant_pictures_are_noted(read: Callable[[bytes], Picture]) -> None:
    long = "longer than 20:1"
    same = "all pixels have the same colour"
    assert read(encode(photo(16, 321))).notes == (long,)
    assert read(encode(photo(16, 320))).notes == ()
    assert read(encode(np.zeros((330, 16, 3), np.uint8))).notes == (long, same)
    assert read(encode(np.full((16, 16), 255, np.uint8), "JPEG")).notes == (same,)


def test_apng_with_ten_thousand_frames_is_not_walked(read: Callable[[bytes], Picture]) -> None:
    first = photo(16, 16)
    control = struct.pack(">IIIIHHBB", 16, 16, 0, 0, 1, 10, 0, 0)
    parts = [chunk(b"acTL", struct.pack(">II", 10_001, 0)), chunk(b"fcTL", struct.pack(">I", 0) + control)]
    data = png(16, 16, 8, 2, first.tobytes(), *parts)[: -len(chunk(b"IEND"))]
    # No frame but the first could be decoded.
    frames = (
        chunk(b"fcTL", struct.pack(">I", 2 * number + 1) + control)
        + chunk(b"fdAT", struct.pack(">I", 2 * number + 2) + b"nonsense")
        for number in range(10_000)
    )
    picture = read(data + b"".join(frames) + chunk(b"IEND"))
    np.testing.assert_array_equal(picture.pixels, first)
    assert picture.notes == ("an animation: its first frame is used",)


def test_webp_animation(read: Callable[[bytes], Picture]) -> None:
    frames = [Image.fromarray(np.roll(photo(16, 16), shift, axis=1)) for shift in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "WebP", save_all=True, append_images=frames[1:], lossless=True)
    head, last = stream.getvalue().rsplit(b"ANMF", 1)
    data = head + (b"ANMF" + last) * 10_000
    picture = read(b"RIFF" + struct.pack("<I", len(data) - 8) + data[8:])
    np.testing.assert_array_equal(picture.pixels, photo(16, 16))
    assert picture.notes == ("an animation: its first frame is used",)


# Files that are refused.


def refuse(read: Callable[[bytes], Picture], data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    assert "file.jpg" in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", "an empty file"),
        (b"a line of text\n", "an unknown kind of file"),
        (bytes(1000), "an unknown kind of file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><html></html>", "an SVG, XML or HTML"),
        (encode(photo(), "TIFF"), "a TIFF"),
        (b"MM\0*" + bytes(100), "a TIFF"),
        (encode(photo(), "PDF"), "a PDF"),
        (encode(photo(), "EPS"), "an EPS"),
        (b"8BPS\0\1" + bytes(100), "a PSD"),
        (b"SIMPLE  =                    T", "a FITS"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL"),
        (b"\0\0\0\x20ftypavif", "a damaged AVIF"),
        (b"\0\0\0\x18ftypheic", "a damaged HEIC"),
        (b"GIF89a", "a damaged GIF"),
        (encode(photo(), "PPM"), "an unknown kind of file"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "an unknown kind of file"),
        (b"RIFF\x24\0\0\0WEBPfmt ", "a damaged WebP"),
        (b"BMW builds cars in Bavaria", "an unknown kind of file"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_other_content_is_named(read: Callable[[bytes], Picture], data: bytes, found: str) -> None:
    refuse(read, data, f"found {found}")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_half_a_file(read: Callable[[bytes], Picture], kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    data = encode(noise, kind)
    refuse(read, data[: int(len(data) * share)], f"a damaged {kind} file")


def test_every_flipped_bit_of_png_pixels_is_found(read: Callable[[bytes], Picture]) -> None:
    data = encode(photo(16, 16))
    start = data.index(b"IDAT") + 4
    (length,) = struct.unpack_from(">I", data, start - 8)
    for bit in range(0, 8 * length, 7):
        flipped = bytearray(data)
        flipped[start + bit // 8] ^= 1 << bit % 8
        refuse(read, bytes(flipped), "a damaged PNG file")


def header_only(kind: str, width: int, height: int) -> bytes:
    """A file that says it is this large and holds next to nothing."""
    if kind == "PNG":
        return png(width, height, 8, 2, b"")
    if kind == "WebP":
        frame = encode(photo(16, 16), "WebP", lossless=True)[12:]
        canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        animation = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
        animation += b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(6) + b"\x0f\0\0\x0f\0\0" + bytes(4) + frame
        body = b"WEBPVP8X" + struct.pack("<II", 10, 2) + canvas + animation
        return b"RIFF" + struct.pack("<I", len(body)) + body
    data = encode(photo(16, 16), "JPEG")
    return data.replace(struct.pack(">HH", 16, 16), struct.pack(">HH", height, width), 1)


@pytest.mark.parametrize(
    "kind, width, height",
    [
        *[("PNG", 60000, 60000), ("PNG", 9460, 9460), ("PNG", 14000, 14000), ("PNG", 10000, 5001)],
        *[("JPEG", 60000, 60000), ("JPEG", 10000, 5001), ("WebP", 16000, 16000), ("WebP", 9460, 9460)],
    ],
)
def test_too_many_pixels_are_refused_by_the_header(
    read: Callable[[bytes], Picture], kind: str, width: int, height: int
) -> None:
    # Decoding them would find them damaged, or take gigabytes.
    refuse(read, header_only(kind, width, height), r"megapixels, expected at most 50")


READ = """
import sys, types
from pathlib import Path
# The package without what it re-exports.
package = types.ModuleType("sdipc_jax")
package.__path__ = [sys.argv[1]]
sys.modules["sdipc_jax"] = package
from sdipc_jax.pictures import reading as images

def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

images.MAX_PIXELS = int(sys.argv[3])
before = memory("VmRSS")
try:
    images.read_picture(sys.argv[2])
except images.InputError as error:
    print(str(error)[-60:])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process has taken")
def test_196_megapixels_in_a_small_file_take_no_memory(tmp_path: Path) -> None:
    """Whole files: one of a third of the size, read with a higher limit, shows that the measure would tell."""
    huge, large = tmp_path / "huge.png", tmp_path / "large.png"
    Image.new("L", (14000, 14000)).save(huge, compress_level=1)
    Image.new("L", (8000, 8000)).save(large, compress_level=1)
    assert huge.stat().st_size < 1_000_000

    def growth(path: Path, limit: int) -> tuple[int, str]:
        arguments = [sys.executable, "-c", READ, str(Path(images.__file__).parent.parent), str(path), str(limit)]
        ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
        *refusal, taken = ran.stdout.splitlines()
        return int(taken), "".join(refusal)

    taken, refusal = growth(huge, images.MAX_PIXELS)
    assert refusal.endswith("megapixels, expected at most 50: scale the picture down")
    assert taken < 50_000_000
    taken, refusal = growth(large, 100_000_000)
    assert refusal == ""
    assert taken > 150_000_000


@pytest.mark.parametrize(
    "width, height, words",
    [
        *[(1, 1, "at least 16"), (1, 20000, "at least 16"), (20000, 1, "at least 16"), (0, 10, "damaged PNG")],
        *[(15, 400, "at least 16"), (16, 3201, "200:1")],
    ],
)
def test_sides(read: Callable[[bytes], Picture], width: int, height: int, words: str) -> None:
    refuse(read, png(width, height, 8, 0, bytes(width * height)), words)


@pytest.mark.parametrize("size", [2_000_000, 100_000_000])
@pytest.mark.parametrize("after_pixels", [False, True])
@pytest.mark.parametrize("name", [b"zTXt", b"iTXt"])
def test_text_bombs_are_not_unpacked(
    read: Callable[[bytes], Picture], size: int, after_pixels: bool, name: bytes
) -> None:
    packed = zlib.compress(bytes(size), 1)
    bomb = chunk(name, b"Comment\0\0" + packed if name == b"zTXt" else b"Comment\0\1\0\0\0" + packed)
    data = png(16, 16, 8, 2, photo(16, 16).tobytes())
    place = -12 if after_pixels else 33
    picture = read(data[:place] + bomb + data[place:])
    np.testing.assert_array_equal(picture.pixels, photo(16, 16))
    assert picture.notes == ("its text is over a megabyte and was not used",)


def test_many_small_texts_are_not_unpacked(read: Callable[[bytes], Picture]) -> None:
    texts = [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(900_000), 1))] * 100
    picture = read(png(16, 16, 8, 2, photo(16, 16).tobytes(), *texts))
    np.testing.assert_array_equal(picture.pixels, photo(16, 16))


def test_profile_bombs(read: Callable[[bytes], Picture]) -> None:
    bomb = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(100_000_000), 1))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000), 1))
    profile_note = "its colour profile is over a megabyte and was not used"
    for extra, notes in [((bomb,), {profile_note}), ((bomb, text), {profile_note, "its text" + profile_note[18:]})]:
        picture = read(png(16, 16, 8, 2, photo(16, 16).tobytes(), *extra))
        np.testing.assert_array_equal(picture.pixels, photo(16, 16))
        assert set(picture.notes) == notes
    noted = read(encode(photo(), "WebP", lossless=True, icc_profile=bytes(5_000_000)))
    assert noted.notes == ("its colour profile of 5000000 bytes is too large and was not used",)


def test_a_profile_counts_although_the_text_is_too_large(read: Callable[[bytes], Picture]) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    profile = rgb_profile(P3_XYZ, srgb_to_linear)
    expected = read(encode(photo(), icc_profile=profile)).pixels
    np.testing.assert_array_equal(read(encode(photo(), icc_profile=profile, pnginfo=text)).pixels, expected)
    assert not np.array_equal(expected, photo())


def test_jpeg_that_goes_over_its_pixels_again_and_again(read: Callable[[bytes], Picture]) -> None:
    data = encode(np.zeros((2000, 2000), np.uint8), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    refuse(read, data[:-2] + last_scan * 1300 + data[-2:], r"13\d\d JPEG scans")


def test_paths_that_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    for path, words in [
        (tmp_path / "missing.png", "No such file"),
        (tmp_path, "found a folder or a device"),
        (tmp_path / "pipe", "found a folder or a device"),
        (tmp_path / "large", "more than 200 MB"),
        (tmp_path / ("long" * 100), "name too long"),
        (tmp_path / "nul\0", "null byte"),
        (tmp_path / "two\nlines \udcff", "No such file"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            read_picture(path)
        assert str(caught.value).isprintable()


def seeds_of_mutation() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    profile = rgb_profile(P3_XYZ, srgb_to_linear)
    rgba = np.concatenate([photo(24, 20), photo(24, 20)[..., :1]], axis=-1)
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 50, zip=True)
    text.add_itxt("c", "d" * 50, zip=True)
    frames = [Image.fromarray(np.roll(photo(20, 20), shift, axis=0)) for shift in range(3)]
    palette = chunk(b"PLTE", bytes(range(48)))
    return [
        encode(photo(24, 20), exif=exif, icc_profile=profile, pnginfo=text),
        encode(frames[0], save_all=True, append_images=frames[1:]),
        png(16, 16, 4, 3, bytes(range(128)), palette, chunk(b"tRNS", bytes(range(16)))),
        png(16, 16, 16, 0, photo(16, 16)[..., :2].tobytes(), chunk(b"tRNS", b"\0\1")),
        encode(rgba),
        encode(photo(24, 20), "JPEG", exif=exif, icc_profile=profile),
        encode(photo(24, 20), "JPEG", progressive=True, comment=b"text"),
        encode(Image.fromarray(rgba, "CMYK"), "JPEG"),
        encode(photo(24, 20), "WebP", exif=exif, icc_profile=profile),
        encode(rgba, "WebP", lossless=True),
        encode(frames[0], "WebP", save_all=True, append_images=frames[1:]),
    ]


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Flips, overwrites, cuts, repeats or inserts, in a few places."""
    for _ in range(random.integers(1, 4)):
        start, length = int(random.integers(len(data) + 1)), int(random.integers(1, 9))
        head, part, tail = data[:start], data[start : start + length], data[start + length :]
        extreme = [0, 1, 0x7F, 0x80, 0xFE, 0xFF]
        match random.integers(6):
            case 0:
                part = bytes(byte ^ 1 << int(random.integers(8)) for byte in part)
            case 1:
                part = random.bytes(len(part))
            case 2:
                part = bytes([extreme[random.integers(6)]]) * len(part)
            case 3:
                part = b""
            case 4:
                part = part * 3
            case 5:
                tail = tail if random.integers(4) else b""
        data = head + part + tail
    return data


def mutate_inside_chunks(data: bytes, random: np.random.Generator) -> bytes:
    """Mutates one chunk of a PNG and gives it the right length and checksum."""
    parts = list(chunks(data))
    chosen = random.integers(len(parts))
    parts[chosen] = (parts[chosen][0], mutate(parts[chosen][1], random))
    return SIGNATURE + b"".join(chunk(*part) for part in parts)


# As in production, where Pillow's warnings are no exceptions.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(11))
def test_mutations_are_read_or_refused(read: Callable[[bytes], Picture], number: int) -> None:
    data = seeds_of_mutation()[number]
    random = np.random.default_rng(number)
    read(data)
    refusals = []
    for turn in range(200):
        inside = data.startswith(SIGNATURE) and turn % 2
        mutated = mutate_inside_chunks(data, random) if inside else mutate(data, random)
        try:
            picture = read(mutated)
        except InputError as error:
            refusals.append(str(error))
        else:
            assert picture.pixels.dtype == np.uint8
            assert picture.pixels.shape[2:] == (3,)
            assert min(picture.pixels.shape[:2]) >= 16
    assert len(refusals) > 10
    assert all(refusal.isprintable() for refusal in refusals)


# Preprocessing.


def test_golden_preprocessing() -> None:
    """The numbers of the original CLIP's preprocessing; see golden/README.md."""
    golden = np.load(GOLDEN / "clip_preprocess.npz")
    found = preprocess(read_picture(GOLDEN / "franz-kafka.jpg").pixels, Preprocessing())
    assert found.shape == (224, 224, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[::3, ::3], golden["every_third"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.mean((0, 1), dtype=np.float64), golden["channel_means"], rtol=0, atol=1e-6)


def test_preprocessing_by_hand() -> None:
    settings = Preprocessing(
        size=4, crop_size=(2, 2), rescale_factor=0.5, image_mean=(1.0, 2.0, 3.0), image_std=(2.0, 4.0, 8.0)
    )
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    expected = (pixels[1:3, 2:4] * 0.5 - [1, 2, 3]) / [2, 4, 8]
    np.testing.assert_allclose(preprocess(pixels, settings), expected, atol=1e-6)


def test_crop_of_a_smaller_picture_is_padded_with_black() -> None:
    settings = Preprocessing(crop_size=(5, 3), do_resize=False, do_rescale=False, do_normalize=False)
    found = preprocess(np.full((2, 4, 3), 9, np.uint8), settings)
    assert found.dtype == np.float32
    # Three missing rows: two above, one below.
    np.testing.assert_array_equal(found[..., 0], [[0] * 3, [0] * 3, [9] * 3, [9] * 3, [0] * 3])


@pytest.mark.parametrize(
    "height, width, expected",
    [(640, 480, (298, 224)), (480, 640, (224, 298)), (77, 77, (224, 224)), (99, 100, (224, 226))],
)
def test_long_side_is_rounded_down(height: int, width: int, expected: tuple[int, int]) -> None:
    assert Preprocessing().resized(height, width) == expected


OLD_LAYOUT = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
NEW_LAYOUT = OLD_LAYOUT | {
    "_processor_class": None,
    "crop_size": {"height": 224, "width": 224},
    "data_format": "channels_first",
    "default_to_square": False,
    "device": None,
    "do_convert_rgb": True,
    "do_pad": None,
    "do_rescale": True,
    "image_processor_type": "CLIPImageProcessorFast",
    "pad_size": None,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
    "use_square_size": False,
}


@pytest.mark.parametrize("values", [{}, OLD_LAYOUT, NEW_LAYOUT, Preprocessing().to_json()])
def test_every_layout_of_the_defaults(values: dict[str, Any]) -> None:
    assert Preprocessing.from_json(values, "here") == Preprocessing()


def test_json_round_trip() -> None:
    values = {"size": {"height": 30, "width": 40}, "do_center_crop": False, "image_mean": 0.5, "resample": 2}
    settings = Preprocessing.from_json(values, "here")
    assert settings.size == settings.output_size == (30, 40)
    assert settings.image_mean == (0.5, 0.5, 0.5)
    assert Preprocessing.from_json(settings.to_json(), "here") == settings
    assert settings.to_json()["size"] == {"height": 30, "width": 40}
    assert Preprocessing().to_json()["size"] == {"shortest_edge": 224}
    assert len({settings, Preprocessing(), Preprocessing()}) == 2
    assert Preprocessing(crop_size=(5, 6)).output_size == (5, 6)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"crop_pct": 0.9}, "crop_pct is not an option"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size is {'shortest_edge'"),
        ({"size": 0}, "size is 0"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": 224.5}, "size is 224.5"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size is"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": True}, "resample is True"),
        ({"do_resize": 1}, "do_resize is 1"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std is"),
        ({"do_center_crop": False}, "without do_center_crop"),
        ({"do_pad": True}, "do_pad is True"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type is 'ViTImageProcessor'"),
    ],
)
def test_options_that_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Preprocessing.from_json(values, "clip/preprocessor_config.json")
    assert str(caught.value).startswith("clip/preprocessor_config.json: ")
    assert "\n" not in str(caught.value)
