"""Pictures that commands are given: folders of them, other shapes than the tower's, and notes that are counted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdipc_jax import Bundle, InputError, read_pictures
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.checkpoints.bundle import with_fit
from sdipc_jax.commands import batch as command
from sdipc_jax.commands.inputs import expand, read_inputs
from sdipc_jax.pictures.preprocessing import Preprocessing, preprocess, seen
from sdipc_jax.pictures.sheets import mark_middle
from sdipc_jax.records import Counted
from sdipc_jax.settings import Fit
from sdipc_jax.tuning.config import RunSettings, read_run
from sdipc_jax.tuning.data import find_examples
from tests.batch_jobs import Stub, write_job

PLAIN = Preprocessing(size=6, crop_size=(4, 4), do_rescale=False, do_normalize=False, resample=0, image_mean=(0.5,) * 3)


def striped(height: int, width: int) -> np.ndarray:
    """Each column has its own level."""
    return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None] + 1, (height, width, 3)).copy()


def with_option(fit: Fit) -> Preprocessing:
    return Preprocessing(**{name: getattr(PLAIN, name) for name in Preprocessing.__dataclass_fields__} | {"fit": fit})


def test_squash_shows_all_of_a_picture_out_of_proportion() -> None:
    found = preprocess(striped(4, 8), with_option("squash"))
    # The nearest neighbour of every second column.
    np.testing.assert_array_equal(found[0, :, 0], [2, 4, 6, 8])
    assert found.shape == (4, 4, 3)


def test_pad_shows_all_of_a_picture_on_the_mean_colour() -> None:
    found = preprocess(striped(4, 8), with_option("pad"))
    np.testing.assert_array_equal(found[:, 0, 0], [128, 2, 2, 128])
    np.testing.assert_array_equal(found[1, :, 0], [2, 4, 6, 8])
    tall = preprocess(striped(8, 4), with_option("pad"))
    np.testing.assert_array_equal(tall[0, :, 0], [128, 2, 4, 128])
    normalised = Preprocessing(fit="pad")
    grey = preprocess(np.zeros((100, 50, 3), np.uint8), normalised)
    # The bars are nothing to the tower, but for rounding to 8 bits.
    np.testing.assert_allclose(grey[:, 0], 0, atol=0.01)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_square_picture_is_the_same_however_it_is_fitted(fit: Fit) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    np.testing.assert_array_equal(preprocess(pixels, Preprocessing(fit=fit)), preprocess(pixels, Preprocessing()))


def test_the_choice_is_in_no_file() -> None:
    assert "fit" not in Preprocessing(fit="pad").to_json()
    with pytest.raises(InputError, match="fit is not an option"):
        Preprocessing.from_json({"fit": "pad"}, "preprocessor_config.json")


@pytest.mark.parametrize(
    "height, width, expected",
    [(100, 100, (1, 1)), (100, 400, (1, 0.25)), (300, 100, (1 / 3, 1)), (50, 60, (1, 224 / 268))],
)
def test_what_is_seen(height: int, width: int, expected: tuple[float, float]) -> None:
    assert seen(height, width, Preprocessing()) == pytest.approx(expected, abs=1e-3)
    assert seen(height, width, Preprocessing(fit="pad")) == (1, 1)
    assert seen(height, width, Preprocessing(size=(224, 224))) == (1, 1)


def save(path: Path, height: int, width: int, suffix: str = ".png") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(striped(height, width)).save(path.with_suffix(suffix))
    return path.with_suffix(suffix)


def test_a_picture_that_loses_much_has_a_note_and_a_frame_on_the_sheet(tiny: Bundle, tmp_path: Path) -> None:
    paths = [save(tmp_path / "wide", 40, 160), save(tmp_path / "square", 40, 44)]
    (wide, square), failures = read_inputs(tiny.config, paths)
    assert failures == []
    assert wide.subject.record["notes"] == [
        "75% of it lie outside of the middle that is used: --fit pad uses all",
    ]
    assert "notes" not in square.subject.record
    np.testing.assert_array_equal(square.subject.picture, striped(40, 44))
    shown = wide.subject.picture
    assert shown is not None
    # The middle quarter, from 60 to 100.
    changed = (shown != striped(40, 160)).any(axis=(0, 2)).nonzero()[0]
    assert (changed.min(), changed.max()) == (60, 99)
    for fit in ("pad", "squash"):
        (all_of_it, _), _ = read_inputs(with_fit(tiny.config, fit), paths)
        assert "notes" not in all_of_it.subject.record
        np.testing.assert_array_equal(all_of_it.subject.picture, striped(40, 160))
        np.testing.assert_array_equal(read_pictures(tiny, paths, fit=fit)[0], all_of_it.pixels)
        assert not np.array_equal(all_of_it.pixels, wide.pixels)


def test_a_frame_can_be_seen_on_any_ground() -> None:
    for level in (0, 255):
        framed = mark_middle(np.full((20, 60, 3), level, np.uint8), 1.0, 0.5)
        assert (framed[1:-1, 15:17] != level).any(axis=(1, 2)).all()
        assert (framed[:, :15] == level).all()


def test_folders_stand_for_their_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    expected = [save(folder / "a", 20, 20), save(folder / "b/c", 20, 20, ".jpg"), save(folder / "d", 20, 20, ".gif")]
    jfif = save(folder / "e", 20, 20, ".jpg").rename(folder / "e.jpe")
    (folder / "notes.md").write_text("text")
    (folder / "._a.png").write_bytes(b"Mac")
    alone = save(tmp_path / "alone", 20, 20)
    files, notes = expand([alone, folder, alone])
    assert files == [alone, *expected, jfif, alone]
    assert len(notes) == 1
    assert "2 files not taken" in notes[0]
    assert ".md" in notes[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/x.tif").write_bytes(b"II*\0")
    with pytest.raises(InputError, match=r"empty: found a folder without pictures; .*\.tif.*, expected one"):
        expand([tmp_path / "empty"])


def test_notes_are_counted_and_cut() -> None:
    counted = Counted()
    for number in range(30):
        counted.add(f"{number}.png", ["transparent: shown on white", f"of its own: {number}"])
    lines = counted.lines()
    assert lines[0] == "transparent: shown on white: 30 pictures, the first is 0.png"
    assert lines[1] == "0.png: of its own: 0"
    assert lines[-1] == "and 23 more kinds of notes"
    assert len(lines) == 9


def test_runs_from_before_there_was_a_choice_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {tmp_path}\noutput_dir: {tmp_path}\n")
    assert "fit" not in read_run(path, "ct").identity()
    assert read_run(path, "ct", ["fit=pad"]).identity()["fit"] == "pad"
    with pytest.raises(InputError, match="fit is 'stretch'"):
        read_run(path, "ct", ["fit=stretch"])


def odd_pictures(folder: Path) -> Path:
    """Two that are transparent, one that is long, and one without a note."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 250, (32, 32, 4), np.uint8)
    for name in "ab":
        Image.fromarray(noise).save(folder / f"{name}.png")
    Image.fromarray(np.tile(noise[:16, :, :3], (1, 12, 1))).save(folder / "c.png")
    Image.fromarray(noise[..., :3]).save(folder / "d.png")
    return folder


def test_batch_tells_of_odd_pictures_counted_and_fits_them(tiny_folder: Path, tmp_path: Path) -> None:
    pictures = odd_pictures(tmp_path / "pictures")
    digests = set()
    for fit in ("crop", "pad", "squash"):
        values = {"model": str(tiny_folder), "scale": 5.0, "vectors": True, "fit": fit}
        job = write_job(tmp_path / f"{fit}.yaml", source=pictures, **values)
        outcome = command.batch(BatchSettings(job=job), lambda done: None, make_device=Stub())
        assert "transparent: shown on white: 2 pictures, the first is a.png" in outcome.notes
        assert "c.png: longer than 20:1" in outcome.notes
        assert not any("d.png" in note for note in outcome.notes)
        assert "transparent: shown on white: 2 pictures" in str(outcome)
        digests.add(outcome.manifest["digest"])
    assert len(digests) == 3


def test_tune_tells_of_odd_pictures_counted(tmp_path: Path) -> None:
    run = RunSettings(data=odd_pictures(tmp_path / "pictures"), output_dir=tmp_path / "out")
    notes: list[str] = []
    assert len(find_examples(run, notes)) == 4
    folder = tmp_path.resolve() / "pictures"
    assert f"transparent: shown on white: 2 pictures, the first is {folder / 'a.png'}" in notes
    assert f"{folder / 'c.png'}: longer than 20:1" in notes
