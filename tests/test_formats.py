"""The picture formats besides JPEG, PNG and WebP, and what lies around a JPEG."""

import io
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdipc_jax.errors import InputError
from sdipc_jax.pictures import reading
from sdipc_jax.pictures.formats import FORMATS, identify
from sdipc_jax.pictures.jpeg import count_scans, damage, markers
from sdipc_jax.pictures.reading import Picture, decode_picture
from tests.test_images import GOLDEN, encode, mutate, photo

REFUSED = [each.name for each in FORMATS if each.decoder is None]


def heic(pixels: np.ndarray) -> bytes:
    import pillow_heif

    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(stream, quality=90)
    return stream.getvalue()


def gif(frames: int = 1, **options: Any) -> bytes:
    pictures = [Image.fromarray(np.roll(photo(), 7 * shift, axis=1)) for shift in range(frames)]
    return encode(pictures[0], "GIF", **({"save_all": True, "append_images": pictures[1:]} if frames > 1 else options))


FILES: dict[str, Callable[[], bytes]] = {
    "GIF": gif,
    "BMP": lambda: encode(photo(), "BMP"),
    "AVIF": lambda: encode(photo(), "AVIF", quality=90),
    "HEIC": lambda: heic(photo()),
}


@pytest.mark.parametrize("kind", FILES)
def test_further_formats_are_read_by_content(kind: str) -> None:
    found = decode_picture(FILES[kind](), "picture.jpg")
    assert (found.format, found.notes) == (kind, ())
    # A GIF has 256 colours.
    assert np.abs(found.pixels.astype(int) - photo()).mean() < {"BMP": 1e-9, "GIF": 12}.get(kind, 6)


@pytest.mark.parametrize("kind", ["GIF", "AVIF"])
def test_the_first_frame_is_used_with_a_note(kind: str) -> None:
    frames = [Image.fromarray(np.roll(photo(), 16 * shift, axis=1)) for shift in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    found = decode_picture(data, "picture")
    assert found.notes == ("an animation: its first frame is used",)
    alone = decode_picture(encode(frames[0], kind), "picture").pixels
    # An encoder treats a sequence a little differently.
    np.testing.assert_allclose(found.pixels, alone, atol=8 if kind == "AVIF" else 0)


@pytest.mark.parametrize("palette", [False, True])
def test_transparent_gif_is_shown_on_white(palette: bool) -> None:
    image = Image.fromarray(np.repeat([[0], [1]], 16, axis=0).repeat(32, axis=1).astype(np.uint8))
    if palette:
        image.putpalette([10, 20, 30, 200, 100, 50])
    found = decode_picture(encode(image, "GIF", transparency=0), "picture")
    assert found.notes == ("transparent: shown on white",)
    assert (found.pixels[:16] == 255).all()
    np.testing.assert_array_equal(found.pixels[16:], np.broadcast_to([200, 100, 50] if palette else 1, (16, 32, 3)))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_shallow_bmps(mode: str) -> None:
    image = Image.fromarray(photo()).convert(mode)
    found = decode_picture(encode(image, "BMP"), "picture")
    np.testing.assert_array_equal(found.pixels, np.asarray(image.convert("RGB")))


def test_avif_with_alpha_and_orientation() -> None:
    pixels = np.concatenate([photo(), np.zeros_like(photo()[..., :1])], axis=-1)
    assert (decode_picture(encode(pixels, "AVIF"), "picture").pixels > 250).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = decode_picture(encode(photo(), "AVIF", exif=exif, quality=95), "picture").pixels
    assert sideways.shape == (48, 32, 3)
    assert np.abs(sideways.astype(int) - np.rot90(photo(), -1)).mean() < 6


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(photo())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        InputError, match=r"^p: found a HEIC file, expected .*pip install 'sdipc-jax\[heic\]'"
    ) as caught:
        decode_picture(data, "p")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_half_a_file_is_refused(kind: str, share: float) -> None:
    data = FILES[kind]()
    with pytest.raises(InputError, match=f"found a damaged {kind} file"):
        decode_picture(data[: int(share * len(data))], "picture")


def sized(kind: str, width: int, height: int) -> bytes:
    """A small file that says it is this large."""
    data = FILES[kind]()
    if kind == "GIF":
        return data.replace(struct.pack("<HH", 48, 32), struct.pack("<HH", width, height))
    if kind == "BMP":
        return data.replace(struct.pack("<ii", 48, 32), struct.pack("<ii", width, height), 1)
    # Of the picture itself; HEIC files have one of a larger size, from which it is cut.
    return data.replace(
        b"ispe" + bytes(4) + struct.pack(">II", 48, 32), b"ispe" + bytes(4) + struct.pack(">II", width, height)
    )


@pytest.mark.parametrize("kind", ["GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("width, height", [(10_000, 5_001), (9_460, 9_460), (16_000, 16_000)])
@pytest.mark.filterwarnings("ignore")
def test_too_many_pixels_are_refused_by_the_header(kind: str, width: int, height: int) -> None:
    with pytest.raises(InputError, match="megapixels, expected at most 50"):
        decode_picture(sized(kind, width, height), "picture")


def test_a_gif_whose_frame_is_larger_than_its_screen_is_refused_before_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = bytearray(gif())
    place = data.index(b",", 13 + 768)
    data[place + 5 : place + 9] = struct.pack("<HH", 9000, 9000)
    # "Restore to background" has Pillow fill a frame as soon as the file is opened.
    data[place:place] = b"!\xf9\x04\x08\0\0\0\0"
    filled = []
    monkeypatch.setattr(Image.core, "fill", lambda *arguments: filled.append(arguments))
    with pytest.raises(InputError, match="megapixels, expected at most 50"):
        decode_picture(bytes(data), "picture")
    assert not filled


def test_large_bmps_with_run_lengths_are_refused() -> None:
    # 8 bits a pixel with runs; the file ends after a few.
    header = b"BM" + struct.pack("<IHHI", 2000, 0, 0, 54 + 1024)
    header += struct.pack("<IiiHHIIiiII", 40, 3000, 3000, 1, 8, 1, 0, 0, 0, 256, 256)
    with pytest.raises(InputError, match="a BMP with run lengths of 3000x3000 pixels"):
        decode_picture(header + bytes(1024) + b"\x10\x01" * 50, "picture")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_mutations_are_read_or_refused(kind: str) -> None:
    data, random = FILES[kind](), np.random.default_rng(0)
    refusals = []
    for _ in range(100):
        try:
            found: Picture = decode_picture(mutate(data, random), "picture")
        except InputError as error:
            refusals.append(str(error))
        else:
            assert found.pixels.dtype == np.uint8
            assert found.pixels.shape[2:] == (3,)
    assert len(refusals) > 10
    assert all(len(refusal) < 500 and refusal.isprintable() for refusal in refusals)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_formats_are_told_by_content_whatever_the_name(kind: str) -> None:
    starts = {
        **{"TIFF": b"II+\0", "PSD": b"8BPS", "PDF": b"%PDF-1.7", "EPS": b"%!PS-Adobe", "FITS": b"SIMPLE  = "},
        **{"JPEG 2000": b"\xff\x4f\xff\x51", "JPEG XL": b"\xff\x0a\x00", "SVG, XML or HTML": b"\xef\xbb\xbf\n<?xml"},
    }
    found = identify(starts[kind])
    assert found is not None
    assert found.name == kind
    with pytest.raises(InputError, match=f"found an? {kind} file, expected JPEG, PNG"):
        decode_picture(starts[kind], "picture.png")


@pytest.mark.parametrize(
    "start, name",
    [
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafavif", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypheix", "HEIC"),
        (b"\0\0\0\x1cftypavis", "AVIF"),
        (b"\0\0\0\x1cftypqt  ", None),
    ],
)
def test_files_in_boxes_are_told_by_their_brands(start: bytes, name: str | None) -> None:
    found = identify(start)
    assert (found and found.name) == name


# Around a JPEG.


def test_a_film_behind_a_jpeg_holds_no_scans_of_it() -> None:
    data = encode(photo(200, 300), "JPEG")
    film = b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08\x01" * 5000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_SCANNED_PIXELS", 5 * 200 * 300)
        for behind in (film, encode(photo(200, 300), "JPEG") * 9, b"\xff\xda" * 100):
            found = decode_picture(data + behind, "picture")
            np.testing.assert_array_equal(found.pixels, decode_picture(data, "picture").pixels)


@pytest.mark.parametrize("options, scans", [({}, 1), ({"progressive": True}, 10), ({"restart_marker_rows": 1}, 1)])
def test_scans_are_counted_up_to_the_end_of_the_picture(options: dict[str, Any], scans: int) -> None:
    # A thumbnail inside of a segment is no scan of the picture.
    exif = Image.Exif()
    exif[0x010E] = "thumbnail: \udcff\udcda".encode("utf-8", "surrogateescape")
    data = encode(photo(200, 300), "JPEG", exif=exif, **options)
    assert data.count(b"\xff\xda") > scans
    assert count_scans(data) == count_scans(data + data) == scans
    marker, place, end = [*markers(data + b"behind")][-1]
    assert (marker, place, end) == (0xD9, len(data) - 2, len(data))


@pytest.mark.parametrize("cut", [0, 1, 3, 100, 700])
def test_markers_of_a_cut_file_end(cut: int) -> None:
    assert all(place <= end for _, place, end in markers(encode(photo(), "JPEG")[:cut]))


WHOLE: list[dict[str, Any]] = [
    *({}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}, {"optimize": True}),
    *({"progressive": True}, {"progressive": True, "restart_marker_rows": 2}, {"quality": 5}, {"quality": 100}),
]


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whole_jpegs_have_no_note_of_damage(options: dict[str, Any], mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 113, 3), np.uint8)
    for pixels in (photo(90, 113), noise, np.full((17, 16, 3), 128, np.uint8), np.full((90, 113, 3), 255, np.uint8)):
        data = encode(Image.fromarray(pixels).convert(mode), "JPEG", **options)
        assert damage(data) is None
        assert damage(data + b"a film" * 100) is None


def overwritten(data: bytes, share: float, count: int, value: bytes = b"\0") -> bytes:
    place = int(len(data) * share)
    return data[:place] + value * count + data[place + count * len(value) :]


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
@pytest.mark.parametrize(
    "harm",
    [
        lambda data, share: data[: int(len(data) * share)] + b"\xff\xd9",
        lambda data, share: overwritten(data, share, 1000),
        lambda data, share: data[: int(len(data) * share)] + data[int(len(data) * share) + 400 :],
        lambda data, share: data[: int(len(data) * share)] + bytes(range(50, 250)) * 4 + data[int(len(data) * share) :],
    ],
    ids=["cut", "zeros", "left out", "put in"],
)
def test_jpegs_that_are_damaged_inside_are_noted(harm: Callable[[bytes, float], bytes], share: float) -> None:
    for data in (encode(photo(300, 403), "JPEG"), (GOLDEN / "franz-kafka.jpg").read_bytes()):
        found = decode_picture(harm(data, share), "picture")
        assert found.notes == ("damaged inside: part of it may be grey or wrong",)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_progressive_jpegs_that_lack_scans_are_noted(share: float) -> None:
    data = encode(photo(90, 113), "JPEG", progressive=True)
    assert damage(data[: int(len(data) * share)] + b"\xff\xd9") is not None


def test_restart_markers_out_of_order_are_noted() -> None:
    data = encode(photo(90, 113), "JPEG", restart_marker_rows=1)
    first, second = data.index(b"\xff\xd1"), data.index(b"\xff\xd2")
    assert damage(data[:first] + data[second:]) is not None
