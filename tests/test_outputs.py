"""Output folders: one run each, no file lost, names that any file system takes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdipc_jax.errors import InputError
from sdipc_jax.files import check_writable
from sdipc_jax.pictures.outputs import OutputFolder, Subject, check_output, unique_stems
from sdipc_jax.pictures.sheets import read_metadata


def picture(level: int) -> np.ndarray:
    return np.full((32, 32, 3), (level, 0, 9), np.uint8)


CAT, DOG = Subject("cat", {"input": "cat.png"}, picture(50)), Subject("dog", {"text": "dog"})


def test_pictures_manifest_and_sheet(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "a" / "b", [CAT, DOG])
    folder.add_record({"input": "bad.png", "error": "found nothing"})
    for index in range(2):
        folder.add(0, index, picture(100 + index), {"seed": 7})
    folder.add(1, 0, picture(200), {"seed": 7})
    sheet = np.asarray(Image.open(folder.finish()))
    assert sorted(os.listdir(folder.folder)) == [
        *("cat-000.png", "cat-001.png", "dog-000.png"),
        *("manifest.jsonl", "sheet.png"),
    ]
    lines = [json.loads(line) for line in (folder.folder / "manifest.jsonl").read_text().splitlines()]
    assert lines == folder.records
    assert lines[0] == {"input": "bad.png", "error": "found nothing"}
    assert lines[2] == {"file": "cat-001.png", "input": "cat.png", "index": 1, "seed": 7}
    for line in lines[1:]:
        assert read_metadata(folder.folder / line["file"]) == line
    # The input, then its results, from left to right; below them the second row.
    firsts = [np.argwhere((sheet == (level, 0, 9)).all(-1)).min(0) for level in (50, 100, 101, 200)]
    assert firsts[0][0] == firsts[1][0] == firsts[2][0] < firsts[3][0]
    assert firsts[0][1] < firsts[1][1] < firsts[2][1]
    assert firsts[3][1] == firsts[0][1]


def test_another_run_is_refused_and_replaced_whole(tmp_path: Path) -> None:
    first = OutputFolder(tmp_path, [CAT, DOG])
    first.add(0, 0, picture(1), {})
    first.add(1, 0, picture(2), {})
    first.finish()
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"manifest.jsonl is there already: choose another --output-dir or --ov"):
        check_output(tmp_path, [CAT], 1, overwrite=False)
    check_output(tmp_path, [CAT], 1, overwrite=True)
    assert len(os.listdir(tmp_path)) == 5
    OutputFolder(tmp_path, [CAT])
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_no_file_of_the_users_is_overwritten_unasked(tmp_path: Path) -> None:
    for name in ("cat-001.png", "sheet.png"):
        (tmp_path / name).write_bytes(b"precious")
        with pytest.raises(InputError, match=f"{name} is there already: choose another --output-dir or --overwrite"):
            check_output(tmp_path, [CAT], 2, overwrite=False)
        check_output(tmp_path, [CAT], 2, overwrite=True)
        (tmp_path / name).unlink()
    (tmp_path / "cat-002.png").write_bytes(b"precious")
    check_output(tmp_path, [CAT], 2, overwrite=False)


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    OutputFolder(tmp_path, [CAT]).add(0, 0, picture(1), {})
    (tmp_path / "beside.png").write_bytes(b"x")
    result, beside = tmp_path / "cat-000.png", tmp_path / "beside.png"
    with pytest.raises(InputError, match=r"cat-000.png: found an input among the files to be replaced"):
        check_output(tmp_path, [Subject("cat-000", {"input": str(result)})], 1, overwrite=True)
    check_output(tmp_path, [Subject("beside", {"input": str(beside)})], 1, overwrite=True)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.png", tmp_path / "out"
    outside.write_bytes(b"x")
    folder.mkdir()
    (folder / "notes.txt").write_bytes(b"x")
    (folder / "folder.png").mkdir()
    names = ["../outside.png", str(outside), "notes.txt", 3, None, ["a"]]
    lines = [json.dumps({"file": name}) for name in names] + ["not json", "[1]", "\udcff"]
    (folder / "manifest.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    OutputFolder(folder, [CAT])
    assert outside.exists()
    assert sorted(os.listdir(folder)) == ["folder.png", "notes.txt"]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing" / "there")
    before = sorted(os.listdir(tmp_path))
    for path in ("file", "file/deeper", "dangling", "new/" + "long" * 100, "/dev/null/out"):
        with pytest.raises(InputError, match=r"cannot write there .* expected a folder to write to: choose another"):
            check_writable(tmp_path / path)
    check_writable(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, [CAT])
    (tmp_path / "manifest.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"manifest.jsonl: No space left on device"):
        folder.add_record({"x": 1})
    assert folder.records == []


@pytest.mark.parametrize(
    "names, stems",
    [
        (["cat", "cat", "dog", "cat"], ["cat", "cat-2", "dog", "cat-3"]),
        (["cat-2", "cat", "cat"], ["cat-2", "cat", "cat-3"]),
        (["Cat", "cat"], ["Cat", "cat-2"]),
        (["\u00e9", "e\u0301"], ["\u00e9", "e\u0301-2"]),
        (["", ".", "..", " "], ["picture", "picture-2", "picture-3", "picture-4"]),
        (["../../x", "a\\b", "a:b", "what?\n"], ["_.._x", "a_b", "a_b-2", "what__"]),
        (["\udcff", "a\udcff"], ["picture", "a"]),
    ],
)
def test_stems(names: list[str], stems: list[str]) -> None:
    assert unique_stems(names) == stems


def test_long_stems_are_cut_between_letters(tmp_path: Path) -> None:
    stems = unique_stems(["猫" * 200] * 2)
    assert [len(stem.encode()) for stem in stems] == [198, 200]
    folder = OutputFolder(tmp_path, [Subject("猫" * 200, {})])
    folder.add(0, 0, picture(0), {})
    assert (tmp_path / f"{stems[0]}-000.png").exists()
