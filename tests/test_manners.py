"""Likely slips are answered in their own words; pictures are taken and given in the forms that people have."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax.errors import InputError
from sdipc_jax.pictures.handed import read_any, save_pictures
from sdipc_jax.prompts.prompt import check_axes, check_prompt
from sdipc_jax.sampling.rows import WHOLE, rows

EXAMPLE = Path(__file__).parent.parent / "examples/owl.png"


def test_files_pillows_pictures_and_arrays_are_the_same_picture(tiny: sdipc.Bundle) -> None:
    image = Image.open(EXAMPLE)
    levels = np.asarray(read_any(EXAMPLE).pixels)
    found = sdipc.read_pictures(tiny, [EXAMPLE, str(EXAMPLE), image, levels, levels / 255, np.float32(levels / 255)])
    assert found.shape[0] == 6
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


def test_pillows_pictures_are_shown_upright_and_on_white() -> None:
    levels = np.zeros((20, 30, 4), np.uint8)
    levels[:, 15:] = (10, 20, 30, 255)
    image = Image.fromarray(levels)
    np.testing.assert_array_equal(read_any(image).pixels[0, [0, 29]], [[255, 255, 255], [10, 20, 30]])
    image.getexif()[274] = 6
    assert read_any(image).pixels.shape == (30, 20, 3)
    assert read_any(Image.new("CMYK", (20, 20), (0, 0, 0, 0))).pixels.min() == 255


@pytest.mark.parametrize(
    "picture, message",
    [
        (7, "picture 3 is int, expected a path, a Pillow picture or an array: give one"),
        (np.zeros((2, 20, 20, 3)), r"picture 3 has shape \(2, 20, 20, 3\), expected \(height, width, 3\)"),
        (np.full((20, 20, 3), 255.0), "picture 3 has values from 255 to 255, expected"),
        (np.full((20, 20, 3), np.nan), "picture 3 has values from nan to nan, expected"),
        (np.zeros((20, 20, 3), np.int64), "picture 3 has dtype int64, expected"),
    ],
)
def test_what_is_no_picture_is_refused(picture: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_any(picture, "picture 3")


def test_pictures_are_saved_by_number(tmp_path: Path) -> None:
    pictures = np.linspace(0, 1, 2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3)
    files = save_pictures(pictures, tmp_path / "a/b")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a/b/picture-000.png", "a/b/picture-001.png"]
    for file, picture in zip(files, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.round(picture * 255).astype(np.uint8))
    assert [file.name for file in save_pictures(pictures[0], tmp_path, name="owl")] == ["owl-000.png"]
    with pytest.raises(InputError, match="picture 1 has shape"):
        save_pictures([pictures[0], pictures[0, 0]], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="expected a folder to write to"):
        save_pictures(pictures, files[0])


def test_a_bundle_is_told_in_ten_lines(tiny: sdipc.Bundle) -> None:
    lines = repr(tiny).splitlines()
    assert len(lines) <= 10
    assert lines[0].startswith("Bundle of ")
    assert lines[0].endswith(", float32")
    million = sum(leaf.size for leaf in jax.tree.leaves(tiny.params["unet"])) / 1e6
    assert any(line.startswith(f"  unet: {million:.1f} million, ") for line in lines)
    assert "  prompts: (N, 20, 24)" in lines
    assert len(repr(jax.tree.map(lambda leaf: None, tiny)).splitlines()) <= 10


def test_the_name_that_others_have_for_load() -> None:
    assert sdipc.from_pretrained is sdipc.load


@pytest.mark.parametrize(
    "found, message",
    [
        ("red", "negative is the text 'red', expected an array .N, L, D.: encode texts with `tokenize`"),
        (0.5, "negative is a float, expected an array"),
        (
            np.zeros((77, 8)),
            r"negative has shape \(77, 8\), expected .N, L, D. with one row a picture: give neg",
        ),
        (np.zeros((1, 1, 1, 77, 8)), "negative has shape .*: change its shape"),
    ],
)
def test_slips_with_prompts(found: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_prompt("negative", found)


def test_slips_with_vectors_keys_and_seeds(tiny: sdipc.Bundle) -> None:
    with pytest.raises(InputError, match=r"give vectors\[None\]"):
        check_axes("vectors", np.zeros(8), ("N", "D"), most=3)
    with pytest.raises(InputError, match="seeds is a key of JAX, expected a whole number"):
        rows("seeds", jax.random.key(0), 1, WHOLE)
    with pytest.raises(InputError, match=r"pixels has shape \(28, 28, 3\), expected .*: give pixels\[None\]"):
        sdipc.encode_images(tiny, np.zeros((28, 28, 3), np.float32))
    with pytest.raises(InputError, match="projection is none, expected what `closed_form` or `calibrate` gives"):
        sdipc.convert(np.zeros((1, 8)), sdipc.closed_form(tiny, cutoff=0.3, scale=5.0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"embeded: no such folder or file, .*: did you mean embedded\?"):
        sdipc.load("embeded")
    with pytest.raises(InputError, match="neither seeds nor latents, expected one of them: give seeds=0"):
        sdipc.generate(tiny, np.zeros((1, 20, 24), np.float32))


def test_nothing_is_drawn_where_latents_are_given(tiny: sdipc.Bundle) -> None:
    from sdipc_jax.sampling.request import begin

    latents = np.ones((1, 4, 8, 8), np.float32)
    context = np.zeros((1, 20, 24), np.float32)
    _, (without, _) = begin(tiny, context, latents=latents, steps=1, guidance_scale=1.0)
    _, (given, _) = begin(tiny, context, latents=latents, seeds=3, steps=1, guidance_scale=1.0)
    np.testing.assert_array_equal(without, given)
