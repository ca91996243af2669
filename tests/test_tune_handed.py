"""Pictures as people hand them over to `sdipc tune`: which are taken, as what, and what is told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdipc_jax.datasets.examples import Example, data_digest
from sdipc_jax.errors import InputError
from sdipc_jax.tuning.config import RunSettings, read_run
from sdipc_jax.tuning.data import find_examples
from tests.test_datasets import png, write_tar


def look(data: Path, **values: Any) -> tuple[list[Example], list[str]]:
    notes: list[str] = []
    return find_examples(RunSettings(**{"data": data, "output_dir": "out"} | values), notes), notes


def put(folder: Path, *names: str) -> Path:
    """Files of these names: pictures, but for texts, which say their own names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() if name.endswith((".txt", ".md")) else png(number))
    return folder


@pytest.mark.parametrize(
    "beside, words",
    [
        (("masks/0.png", "masks/1.png"), "found 2 pictures beside the folder masks with 2"),
        (("samples/0.png",), "found 2 pictures beside the folder samples with 1"),
        (("a/0.png", "b/0.png"), "found 2 pictures beside the folder a with 1, b with 1"),
    ],
)
def test_pictures_beside_a_subfolder_of_pictures(tmp_path: Path, beside: tuple[str, ...], words: str) -> None:
    put(tmp_path, "0.png", "1.png", *beside)
    with pytest.raises(InputError, match=words):
        look(tmp_path)
    # Who names a subfolder means it.
    label = beside[0].split("/")[0]
    found, notes = look(tmp_path, classes=[label])
    assert {each.path.parent.name for each in found} == {label}
    assert "2 pictures beside the classes' folders are not taken" in notes


@pytest.mark.parametrize("other", ["@eaDir/0.png/thumb.png", "__MACOSX/._0.png", ".git/0.png", "notes/read.md"])
def test_other_programs_folders_are_no_classes(tmp_path: Path, other: str) -> None:
    put(tmp_path / "dog", "0.png", "1.png", other)
    found, notes = look(tmp_path / "dog")
    assert [each.label for each in found] == ["dog", "dog"]
    assert notes[-1].startswith("1 file not taken: 1 ")


@pytest.mark.parametrize("names", [("cat/train/0.png",), ("cat/0.png", "cat/old/1.png"), ("a/b/c/0.png", "d/0.png")])
def test_pictures_too_deep_are_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *names)
    with pytest.raises(InputError, match=r"found pictures in .*, expected one subfolder for each class"):
        look(tmp_path)


def test_kohyas_folders_and_captions_beside_pictures(tmp_path: Path) -> None:
    put(tmp_path, "10_sks dog/0.png", "10_sks dog/0.txt", "10_sks dog/1.png", "1_dog/0.png", "cat/0.png", "cat/b.txt")
    (tmp_path / "10_sks dog/0.txt").write_bytes(b"\xef\xbb\xbfsks dog on\xe2\x80\xa8grass\n")
    found, notes = look(tmp_path)
    assert [(each.label, each.caption) for each in found] == [
        ("10_sks dog", "sks dog on\u2028grass"),
        ("10_sks dog", "a photo of a sks dog"),
        ("1_dog", "a photo of a dog"),
        ("cat", "a photo of a cat"),
    ]
    assert notes == [
        "1 of 4 pictures have a text of the same name beside them",
        "1 file not taken: 1 .txt",
        "10_sks dog is read as 'sks dog': kohya's number of repeats before it is not used, each picture counts once",
        "1_dog is read as 'dog': kohya's number of repeats before it is not used, each picture counts once",
    ]


def test_one_data_set_in_five_forms(tmp_path: Path) -> None:
    pictures, captions = [png(row) for row in range(3)], ["one", "two\u2028lines", "three\x85lines"]
    hugging, kohya = tmp_path / "hugging", tmp_path / "kohya"
    members = []
    for row, (data, caption) in enumerate(zip(pictures, captions, strict=True)):
        for folder in (hugging, kohya / "cat"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.png").write_bytes(data)
        (kohya / "cat" / f"{row}.txt").write_bytes(caption.encode())
        members += [(f"{row}.png", data), (f"{row}.txt", caption.encode()), (f"{row}.cls", b"cat")]
    write_tar(tmp_path / "in.tar", members)
    rows = [{"file_name": f"{row}.png", "text": caption, "class": "cat"} for row, caption in enumerate(captions)]
    (hugging / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Not escaped, with a mark before the first line.
    lines = [{"picture": f"hugging/{row['file_name']}", "caption": row["text"], "class": "cat"} for row in rows]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8-sig")
    images = [{"bytes": data, "path": None} for data in pictures]
    pq.write_table(pa.table({"image": images, "words": captions, "class": ["cat"] * 3}), tmp_path / "in.parquet")
    columns = {"picture": "image", "caption": "words", "class": "class"}
    found = [look(tmp_path / name)[0] for name in ("kohya", "hugging", "in.tar", "in.jsonl")]
    found.append(look(tmp_path / "in.parquet", columns=columns)[0])
    assert [each.caption for each in found[0]] == captions
    assert len({data_digest(each) for each in found}) == 1
    for examples in found:
        assert [each.read().tolist() for each in examples] == [each.read().tolist() for each in found[0]]


def test_classes_that_are_numbers(tmp_path: Path) -> None:
    table = {"picture": [png(0), png(1)], "label": [3, 12], "url": ["a", "b"]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    columns = {"picture": "picture", "class": "label"}
    assert [each.caption for each in look(tmp_path / "in.parquet", columns=columns)[0]] == [
        "a photo of a 3",
        "a photo of a 12",
    ]
    with pytest.raises(InputError, match=r"in\.parquet, row 0: found the column 'label', expected picture, class"):
        look(tmp_path / "in.parquet")
    with pytest.raises(InputError, match="columns names 'label', expected some of picture, class, caption"):
        look(tmp_path / "in.parquet", columns={"label": "label"})
    (tmp_path / "run.yaml").write_text(f"data: {tmp_path}\noutput_dir: out\nclasses: [12, cat]\n")
    assert read_run(tmp_path / "run.yaml", "ct").classes == {"12": "12", "cat": "cat"}
    for typed in ("[012]", "[0x10]", "[1_000]", "[12:30]", "{1_0: ten}"):
        with pytest.raises(InputError, match=r"classes is read with .*put each in quotes"):
            read_run(tmp_path / "run.yaml", "ct", [f"classes={typed}"])


def test_damaged_files_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", [(f"{row}.png", png(row)) for row in range(3)])
    data = (tmp_path / "in.tar").read_bytes()
    (tmp_path / "in.tar").write_bytes(data[:3072])
    with pytest.raises(InputError, match=r"in\.tar, 1: in\.tar: found 3072 bytes and no end mark"):
        look(tmp_path / "in.tar", mode="ct")
    (tmp_path / "in.jsonl").write_text('{"picture": "gs://bucket/a.png", "class": "cat"}\n{"picture": "b"}\n')
    with pytest.raises(InputError, match=r"in\.jsonl, line 1: gs://bucket/a\.png: found an address, expected a file"):
        look(tmp_path / "in.jsonl", mode="ct")
    (tmp_path / "in.jsonl").write_text('{"picture": "a.png"}\n{"picture": "b.png"}\n')
    with pytest.raises(InputError, match=r"2 of 2 pictures cannot be used: in\.jsonl, line 1: .*a\.png: No such file"):
        look(tmp_path / "in.jsonl", mode="ct")


def test_pictures_by_content_and_the_others_counted(tmp_path: Path) -> None:
    put(tmp_path / "cat", "a.jfif", "b.jpe", "c", "d.txt")
    (tmp_path / "cat" / "e.tif").write_bytes(b"II*\0")
    found, notes = look(tmp_path)
    assert [each.path.name for each in found] == ["a.jfif", "b.jpe", "c"]
    assert notes == ["2 files not taken: 1 .tif, 1 .txt"]
    assert all(each.record()["picture"] == str(each.path) for each in found)
