"""Contact sheets, PNG records, and files that are whole or not there."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdipc_jax.errors import InputError
from sdipc_jax.files import write_atomically
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.pictures.sheets import contact_sheet, read_metadata, save_png

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a colour, all of whose pixels lie together."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


def test_sheet_lays_out_rows_of_different_lengths() -> None:
    sheet = contact_sheet([[plain(60, 80, RED), plain(64, 64, GREEN)], [plain(512, 256, BLUE)]], cell=128)
    # 80x60 would not fit twice, 64x64 does; 256x512 is reduced to 64x128. Columns are 80 and 128 wide, margins 8.
    assert sheet.size == (8 + 80 + 8 + 128 + 8, 8 + 128 + 8 + 128 + 8)
    assert box(sheet, RED) == (8, 8 + 34, 88, 42 + 60)
    assert box(sheet, GREEN) == (96, 8, 224, 136)
    assert box(sheet, BLUE) == (8 + 8, 144, 16 + 64, 272)
    assert sheet.getpixel((200, 200)) == (255, 255, 255)


def test_small_pictures_are_enlarged_without_new_colours() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    sheet = np.asarray(contact_sheet([[pixels]]))
    np.testing.assert_array_equal(sheet[8:-8, 8:-8], pixels.repeat(4, axis=0).repeat(4, axis=1))


def test_labels_stand_above_their_rows_and_are_cut_off() -> None:
    rows = [[plain(64, 64, RED)], [plain(64, 64, GREEN)]]
    unlabelled = contact_sheet(rows)
    sheet = np.asarray(contact_sheet(rows, ["a cat\nasleep", "long " * 100])).astype(int)
    assert sheet.shape == (unlabelled.height + 2 * 22, unlabelled.width, 3)
    for top in (8, 8 + 22 + 256 + 8):
        strip = sheet[top : top + 22]
        assert strip.min() < 120
        assert (strip[:, :8] == 255).all()
        assert (strip[:, -8:] == 255).all()
    with pytest.raises(ValueError, match="zip"):
        contact_sheet(rows, ["one"])


def test_letters_beyond_ascii_can_be_told_apart() -> None:
    sheets = [np.asarray(contact_sheet([[plain(64, 64, RED)]], [letter])) for letter in "éèßñЖДαβ"]
    assert len({sheet.tobytes() for sheet in sheets}) == 8


def test_sheet_of_many_pictures_stays_small() -> None:
    sheet = contact_sheet([[plain(64, 64, RED)] * 5] * 400)
    assert sheet.width * sheet.height < 60_000_000
    assert contact_sheet([]).size == (8, 8)


METADATA: dict[str, Any] = {"seed": 3, "text": "déjà vu 猫", "name": "not unicode \udcff", "settings": {"alpha": 0.9}}


def test_png_and_its_record(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "out.png"
    save_png(path, pixels, METADATA)
    assert read_metadata(path) == METADATA
    np.testing.assert_array_equal(read_picture(path).pixels, pixels)
    with Image.open(path) as image:
        assert json.loads(image.info.pop("sdipc")) == METADATA
        assert image.info == {}
    assert os.listdir(tmp_path) == ["out.png"]
    assert path.read_bytes().count(b"iTXt") == 1


def test_gps_of_an_input_goes_nowhere(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "PRIVATE-MAKER"
    exif.get_ifd(0x8825)[29] = "PRIVATE-DATE"
    source, path = tmp_path / "in.jpg", tmp_path / "out.png"
    Image.fromarray(plain(32, 32, RED)).save(source, exif=exif, comment=b"PRIVATE-COMMENT")
    assert source.read_bytes().count(b"PRIVATE") == 3
    picture = read_picture(source)
    assert "PRIVATE" not in repr(picture)
    save_png(path, picture.pixels, {"notes": picture.notes})
    assert b"PRIVATE" not in path.read_bytes()
    with Image.open(path) as image:
        assert not image.getexif()


def test_files_without_a_record_are_refused(tmp_path: Path) -> None:
    plain_png = tmp_path / "plain.png"
    Image.fromarray(plain(16, 16, RED)).save(plain_png)
    other = tmp_path / "other.png"
    record = PngInfo()
    record.add_itxt("sdipc", "[3]")
    Image.fromarray(plain(16, 16, RED)).save(other, pnginfo=record)
    text = tmp_path / "text.png"
    text.write_text("text")
    for path in (plain_png, other, text):
        with pytest.raises(InputError, match="no readable sdipc record"):
            read_metadata(path)
    with pytest.raises(InputError, match="No such file"):
        read_metadata(tmp_path / "missing.png")


def test_file_is_replaced_with_ordinary_rights(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    path.write_bytes(b"old")
    ordinary = path.stat().st_mode
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == ordinary
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    if expected is InputError:
        assert "No space left on device while writing 14 bytes" in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory while writing 1 bytes"):
        write_atomically(tmp_path / "missing" / "file", b"x")
