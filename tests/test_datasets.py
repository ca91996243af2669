"""What people hand over as data sets, read row by row: what is taken, what is told, what is refused by name."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate_datasets import run
from PIL import Image

from sdipc_jax.datasets import lines
from sdipc_jax.datasets.rows import EVERY_ROW, RawRow, Survey, Wanted
from sdipc_jax.datasets.sources import open_source
from sdipc_jax.errors import InputError
from tests.batch_jobs import write_rows

BLOCK = 512
TEXTS = {"picture": "picture", "text": "txt"}


def png(seed: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes | str]]) -> Path:
    """An archive of files, in this order; a text in the place of bytes is where a symbolic link leads."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                member.linkname = content.removeprefix("=")
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def look(path: Path | Sequence[Path], columns: Sequence[str] | None = None) -> tuple[Survey, list[RawRow]]:
    names = str(path) if isinstance(path, Path) else [str(each) for each in path]
    source = open_source(names, columns)
    survey = source.survey()
    rows = list(source.rows(EVERY_ROW))
    assert [row.number for row in rows] == list(range(survey.rows))
    return survey, rows


def good(rows: Sequence[RawRow], columns: dict[str, str] | None = None) -> list[tuple[str, str | None]]:
    """The pictures' names and the texts of the rows that can be used."""
    found = []
    for raw in rows:
        if raw.error is None:
            row, inputs = raw.parse(columns)
            found.append((inputs[0].name.rpartition(":")[2], row.text))
    return found


def errors(rows: Sequence[RawRow], columns: dict[str, str] | None = None) -> dict[int, str]:
    """What is wrong with the others, by their numbers."""
    found = {}
    for raw in rows:
        try:
            raw.parse(columns)
        except InputError as error:
            found[raw.number] = str(error)
    return found


def test_three_hundred_kinds_of_damage(tmp_path: Path) -> None:
    found = Counter((Path(name).suffix, result) for name, _, result in run(tmp_path, range(300)))
    assert {result for _, result in found} <= {"whole", "refused", "failed", "changed", "told", "shorter"}
    # Only lines have no end mark.
    assert {kind for kind, result in found if result == "shorter"} <= {".jsonl"}
    assert all(found[kind, "failed"] > 20 for kind in (".jsonl", ".tar", ".parquet"))


# Archives.


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Four rows of two members; each member has two blocks, or three."""
    members = [
        (f"{row}.{kind}", png(row) if kind == "png" else b"a cat") for row in range(4) for kind in ("png", "txt")
    ]
    return write_tar(tmp_path / "in.tar", members)


def starts(path: Path) -> list[int]:
    """Where the members' headers are, and where the end is."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        return [*(member.offset for member in members), archive.offset]


# Of the header: the name, the size, the checksum, the kind; each changes the sum.
@pytest.mark.parametrize("place", [0, 124, 150, 156])
@pytest.mark.parametrize("member, whole", [(4, 1), (5, 2), (7, 3), (2, 0)])
def test_a_bit_in_a_header(shard: Path, place: int, member: int, whole: int) -> None:
    data = bytearray(shard.read_bytes())
    data[starts(shard)[member] + place] ^= 2
    shard.write_bytes(data)
    if whole == 0:
        with pytest.raises(InputError, match=r"in\.tar: found no header at byte \d+"):
            look(shard, ["picture", "txt"])
        return
    survey, rows = look(shard, ["picture", "txt"])
    assert good(rows, TEXTS) == [(f"{row}.png", "a cat") for row in range(whole)]
    # The row whose members the damage may have taken is not done, and stands for what follows.
    (reason,) = errors(rows, TEXTS).values()
    assert reason.startswith(f"in.tar: found no header at byte {starts_of(data)[member]} (bad checksum), expected")
    assert survey.damaged == (f"in.tar: found no header at byte {starts_of(data)[member]} (bad checksum)",)


def starts_of(data: bytes) -> list[int]:
    """Members' headers by their magic."""
    return [place for place in range(0, len(data), BLOCK) if data[place + 257 : place + 262] == b"ustar"]


@pytest.mark.parametrize("member, beyond, whole", [(4, 0, 1), (5, 100, 2), (7, BLOCK + 3, 3), (8, 0, 3), (8, BLOCK, 3)])
def test_an_archive_that_was_cut_off(shard: Path, member: int, beyond: int, whole: int) -> None:
    """Between members, in a header, in the content, before the end mark and in it."""
    shard.write_bytes(shard.read_bytes()[: starts(shard)[member] + beyond])
    survey, rows = look(shard)
    assert len(survey.damaged) == 1
    assert len(rows) == whole + 1
    assert "expected a whole tar file; this row and what follows in the file are lost" in (rows[-1].error or "")
    # Nothing is missing after the end mark but what fills the record up.
    survey, rows = look(write_tar(shard, [("a.png", png(1))]))
    shard.write_bytes(shard.read_bytes()[: starts(shard)[-1] + 2 * BLOCK])
    assert look(shard)[0].damaged == ()


@pytest.mark.parametrize("member, blocks, whole", [(2, 1, 0), (4, 2, 1), (6, 3, 2)])
def test_zeros_in_the_middle(shard: Path, member: int, blocks: int, whole: int) -> None:
    data, place = bytearray(shard.read_bytes()), starts(shard)[member]
    data[place : place + blocks * BLOCK] = bytes(blocks * BLOCK)
    shard.write_bytes(data)
    message = f"found zeros at byte {place} where a header should be, and data after them"
    if whole == 0:
        with pytest.raises(InputError, match=message):
            look(shard)
    else:
        _, rows = look(shard)
        assert len(rows) == whole + 1
        assert message in (rows[-1].error or "")


def test_zeros_up_to_the_end_are_told_where_they_can_be(shard: Path) -> None:
    data, place = shard.read_bytes(), starts(shard)[4]
    shard.write_bytes(data[:place] + bytes(30 * BLOCK - place % (20 * BLOCK) + 20 * BLOCK))
    assert "bytes of zeros after its end" in look(shard)[0].notes[0]


@pytest.mark.parametrize("content", [b"", b"<!doctype html>" + bytes(2000), b"\x1f\x8b" + bytes(2000), bytes(700)])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"^in\.tar: found .*expected a whole file"):
        look(tmp_path / "in.tar")
    # The others of several go on.
    write_tar(tmp_path / "more.tar", [("a.png", png(1))])
    _, rows = look([tmp_path / "in.tar", tmp_path / "more.tar"])
    assert [row.error is None for row in rows] == [False, True]
    assert (rows[0].error or "").startswith("in.tar: found")


@pytest.mark.parametrize(
    "name, target, works",
    [
        ("b/1.png", "=a/0.png", True),
        ("b/1.png", "../a/0.png", True),
        ("./1.png", "a/0.png", True),
        ("b/1.png", "../c/2.png", True),
        ("b/1.png", "/etc/passwd", False),
        ("b/1.png", "../../a/0.png", False),
        ("b/1.png", "1.png", False),
        ("b/1.png", "=a/9.png", False),
        ("b/1.png", "../a", False),
    ],
)
def test_links_in_an_archive(tmp_path: Path, name: str, target: str, works: bool) -> None:
    path = write_tar(tmp_path / "in.tar", [("a/0.png", png(0)), (name, target), ("c/2.png", "../a/0.png")])
    _, rows = look(path)
    if works:
        assert [row.values["picture"]["bytes"] for row in rows] == [png(0)] * 3
    else:
        (reason,) = errors(rows).values()
        assert f"found a link to {target.removeprefix('=')}, which is no file of the archive" in reason


def test_devices_and_pipes_are_no_rows_without_a_word(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for number, kind in enumerate((tarfile.FIFOTYPE, tarfile.CHRTYPE, b"N")):
            member = tarfile.TarInfo(f"{number}.png")
            member.type = kind
            archive.addfile(member)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    reasons = errors(look(tmp_path / "in.tar")[1])
    assert [reason.split("found a ")[1].split(",")[0] for reason in reasons.values()] == [
        "pipe",
        "device",
        "member of type b'N'",
    ]


@pytest.mark.parametrize(
    "members, words",
    [
        (["0.png", "0.txt", "0.png", "0.txt"], "found 0.png more than once"),
        (["0.png", "0.png", "0.png"], "found 0.png more than once"),
        (["0.txt", "0.TXT", "0.png"], "found 0.TXT more than once"),
        (["0.jpg", "0.png"], "found 0.jpg and 0.png, two pictures of one row"),
        (["v2.0.png", "v2.1.png"], "two pictures of one row (names are split at their first dot)"),
        (["0.png", "1.png", "0.txt"], "found members called 0 apart from each other"),
        (["0.txt"], "found no column 'picture' among 0.txt"),
    ],
)
def test_members_that_are_no_sample(tmp_path: Path, members: Sequence[str], words: str) -> None:
    content = {"txt": b"a cat", "png": png(0), "jpg": png(1, "JPEG")}
    path = write_tar(tmp_path / "in.tar", [(name, content[name[-3:].lower()]) for name in members])
    reasons = errors(look(path)[1])
    assert words in reasons[0]
    assert all(words in reason for reason in reasons.values())


def test_neighbours_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    members = [("0.png", png(0)), ("0.npy", b"\x93NUMPY\xff"), ("0.mask.png", png(1)), ("0.mp3", b"\xff\xfb"),
               ("0.json", b"{broken"), ("0.txt", b"a cat")]  # fmt: skip
    path = write_tar(tmp_path / "in.tar", members)
    assert good(look(path, ["picture", "txt"])[1], TEXTS) == [("0.png", "a cat")]
    # A picture can be chosen by its name's ending, and a column that is none is refused without its bytes.
    assert good(look(path, ["mask.png"])[1], {"picture": "mask.png"}) == [("0.mask.png", None)]
    columns = {"picture": "picture", "text": "npy"}
    assert errors(look(path, ["picture", "npy"])[1], columns)[0].startswith("text is 7 bytes that are no text")


def test_names_with_dots_and_pictures_by_content(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in.tar", [("a v2.0.jpg", png(0, "JPEG")), ("a v2.0.txt", b"a cat"),
                                           ("b.jfif", png(1, "JPEG")), ("c.image", png(2))])  # fmt: skip
    _, rows = look(path, ["picture"])
    assert [name for name, _ in good(rows)] == ["a v2.0.jpg", "b.jfif", "c.image"]
    reasons = errors(look(path, ["picture", "txt"])[1], TEXTS)
    assert "found no column 'txt' among a v2.0.jpg, a v2.0.txt (names are split at their first dot)" in reasons[0]
    assert good(look(path, ["picture", "0.txt"])[1][:1], {"picture": "picture", "text": "0.txt"})[0][1] == "a cat"


# What is passed over.


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    content = {
        "a.jpg": png(0, "JPEG"),
        "b.jfif": png(1, "JPEG"),
        "c.jpe": png(2, "JPEG"),
        "d.JPEG_large": png(3, "JPEG"),
        "e": png(4),
        "f.webp": png(5, "WEBP"),
        "g.tif": png(6, "TIFF"),
        "h.tif": png(7, "TIFF"),
        "i.jpg.part": png(8, "JPEG"),
        "j.html": b"<!doctype html>",
        "README": b"about",
        "._a.jpg": b"\0\5\x16\7",
        ".DS_Store": b"\0",
        "alone.txt": b"of no picture",
        "__MACOSX/._b.jpg": b"\0\5\x16\7",
        "@eaDir/a.jpg/thumb.jpg": png(9, "JPEG"),
        "deep/k.png": png(10),
    }
    for name, data in content.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    os.symlink(tmp_path / "in" / "deep", tmp_path / "in" / "link")
    os.mkfifo(tmp_path / "in" / "pipe")
    survey, rows = look(tmp_path / "in")
    assert [name for name, _ in good(rows)] == ["a.jpg", "b.jfif", "c.jpe", "d.JPEG_large", "deep/k.png", "e", "f.webp"]
    (note,) = survey.notes
    told = dict(reversed(each.split(" ", 1)) for each in note.split(": ")[1].split(", "))
    assert told == {".tif": "2", ".part": "1", ".html": "1", "without an ending": "2", ".txt": "1",
                    "names that begin with a dot": "2", "in __MACOSX": "1", "in @eaDir": "1",
                    "link to a folder": "1"}  # fmt: skip
    assert note.startswith("12 files not taken: 2 ")
    # The same names in an archive.
    kept = ["a.jpg", "e", "._a.jpg", "__MACOSX/._b.jpg", "@eaDir/thumb.jpg"]
    path = write_tar(tmp_path / "in.tar", [(f"./{name}", content.get(name, b"\0")) for name in kept])
    survey, rows = look(path)
    assert [name for name, _ in good(rows)] == ["./a.jpg", "./e"]
    assert survey.notes == ("3 files not taken: 1 in @eaDir, 1 in __MACOSX, 1 name that begins with a dot",)


# Texts.


@pytest.mark.parametrize(
    "data, text",
    [
        (b"\xef\xbb\xbfa red apple", "a red apple"),
        ("a red äpple\r\n".encode("utf-16"), "a red äpple"),
        ("a cat\u2028and a dog\n".encode(), "a cat\u2028and a dog"),
        ("a cat\x85and a dog".encode(), "a cat\x85and a dog"),
        (b"  \n", ""),
        (b"", ""),
    ],
)
def test_texts_beside_pictures(tmp_path: Path, data: bytes, text: str) -> None:
    path = write_tar(tmp_path / "in.tar", [("0.png", png(0)), ("0.txt", data)])
    assert good(look(path, ["picture", "txt"])[1], TEXTS) == [("0.png", text)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.png").write_bytes(png(0))
    (folder / "0.txt").write_bytes(data)
    assert good(look(folder, ["picture", "txt"])[1], TEXTS) == [("0.png", text)]
    survey, rows = look(folder)
    assert good(rows) == [("0.png", None)]
    assert "1 of 1 pictures have a text of the same name beside them, which are not read" in survey.notes[0]


def test_a_text_that_is_none_fails_alone(tmp_path: Path) -> None:
    for number, data in enumerate((b"a cat", b"\xff\xfe\xff", b"\x80abc")):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.txt").write_bytes(data)
    _, rows = look(tmp_path, ["picture", "txt"])
    assert good(rows, TEXTS) == [("0.png", "a cat")]
    assert all("expected a picture's text in UTF-8" in reason for reason in errors(rows, TEXTS).values())


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    rows = [
        b'\xef\xbb\xbf{"picture": "0.png", "text": "one"}\n',
        '{"picture": "1.png", "text": "two\u2028lines"}\r\n'.encode(),
        b"\n",
        '{"picture": "2.png", "text": "three\x85lines"}\n'.encode(),
        # Files that were put together have marks in the middle.
        b'\xef\xbb\xbf{"picture": "3.png"}\n',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"".join(rows))
    _, found = look(tmp_path / "in.jsonl")
    texts = ["one", "two\u2028lines", "three\x85lines", None]
    assert good(found) == [(f"{row}.png", text) for row, text in enumerate(texts)]
    assert [row.place for row in found] == [f"in.jsonl, line {line}" for line in (1, 2, 4, 5)]


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"picture": "a.png", "picture": "b.png"}', "the key 'picture' twice"),
        (b'{"picture": "a.png"', "found no JSON"),
        (b"\0\0\0", "found no JSON"),
        (b'"a.png"', "found a JSON str, expected an object"),
        (b"[" * 100_000, "found no JSON"),
        (b'{"picture": "' + b"x" * 10_000_001 + b'"}', "found a line of more than 10000000 bytes"),
        ('{"picture": "a.png"}'.encode("utf-16"), "found no JSON"),
    ],
    ids=["twice", "cut", "zeros", "text", "deep", "long", "utf-16"],
)
def test_a_bad_line_fails_alone(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"picture": "a.png"}\n' + line + b'\n{"picture": "b.png"}\n')
    _, rows = look(tmp_path / "in.jsonl")
    assert good(rows) == [("a.png", None), ("b.png", None)]
    assert words in errors(rows)[1]
    assert rows[1].place == "in.jsonl, line 2"


def test_a_file_that_shrinks_loses_no_row_without_a_word(tmp_path: Path) -> None:
    line, picture = b'{"picture": "0.png"}\n', pa.table({"picture": ["0.png"] * 4})
    (tmp_path / "in.jsonl").write_bytes(4 * line)
    write_tar(tmp_path / "in.tar", [(f"{row}.png", png(row)) for row in range(4)])
    pq.write_table(picture, tmp_path / "in.parquet")
    for name in ("in.jsonl", "in.tar", "in.parquet"):
        source = open_source(str(tmp_path / name))
        assert source.survey().rows == 4
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2 // BLOCK * BLOCK if name == "in.tar" else len(line)])
        rows = list(source.rows(EVERY_ROW))
        assert [row.number for row in rows] == list(range(4))
        assert name in (rows[-1].error or "")


# Parquet.


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"^a\.parquet: found a damaged Parquet file .*expected a whole file"):
        look(tmp_path / "a.parquet")
    pq.write_table(pa.table({"picture": [png(0), png(1)]}), tmp_path / "b.parquet")
    survey, rows = look([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert [row.error is None for row in rows] == [False, True, True]
    assert survey.damaged[0].startswith("a.parquet: ")
    for size in (1, 8, 100):
        (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-size])
        with pytest.raises(InputError, match=r"a\.parquet: .*; b\.parquet: "):
            look([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_a_broken_group_fails_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [png(row) for row in range(9)]}), tmp_path / "in.parquet", row_group_size=3,
                   compression="zstd", use_dictionary=False, write_page_checksum=True)  # fmt: skip
    column = pq.ParquetFile(tmp_path / "in.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "in.parquet").read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    (tmp_path / "in.parquet").write_bytes(data)
    survey, rows = look(tmp_path / "in.parquet")
    assert survey.rows == 9
    reasons = errors(rows)
    assert list(reasons) == [3, 4, 5]
    assert reasons[3].startswith("in.parquet: row group 1 is damaged (")
    assert [row.place for row in rows[3:6]] == [f"in.parquet, row {row}" for row in (3, 4, 5)]


@pytest.mark.parametrize(
    "values, kind",
    [
        ([{"bytes": png(0), "path": "0.png", "size": 3}], None),
        ([{"bytes": png(0)}], None),
        ([[*png(0)]], pa.list_(pa.uint8())),
        ([png(0)], pa.large_binary()),
        ([png(0)], pa.binary(len(png(0)))),
        ([{"bytes": [*png(0)], "path": None}], None),
    ],
)
def test_columns_that_hold_pictures(tmp_path: Path, values: list[Any], kind: Any) -> None:
    pq.write_table(pa.table({"picture": pa.array(values, kind)}), tmp_path / "in.parquet")
    _, [row] = look(tmp_path / "in.parquet")
    _, [picture] = row.parse(None)
    assert picture.where == png(0)


# Image folders.


def test_an_image_folder_of_hugging_face(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for row in range(3):
        (folder / f"{row}.png").write_bytes(png(row))
    lines = [{"file_name": "1.png", "text": "one"}, {"file_name": "./0.png", "text": "nought"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    survey, rows = look(folder)
    assert good(rows) == [("1.png", "one"), ("./0.png", "nought")]
    assert survey.notes == ("1 file not taken: 1 pictures that metadata.jsonl does not name",)
    assert good(look(folder, ["file_name"])[1], {"picture": "file_name"}) == [("1.png", None), ("./0.png", None)]
    # Others, and deeper ones, are refused by name.
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(InputError, match=r"metadata\.csv: found an image folder's metadata that is not read here"):
        look(folder)
    (folder / "metadata.csv").rename(folder / "metadata.parquet")
    with pytest.raises(InputError, match=r"metadata\.parquet: found"):
        look(folder)
    (folder / "metadata.parquet").unlink()
    with pytest.raises(InputError, match=r"in/metadata\.jsonl: found an image folder below the one that was named"):
        look(tmp_path)


@pytest.mark.parametrize("name", ["in.csv", "in.json", "in.tar.gz", "in.zip", "in"])
def test_other_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(InputError, match=f"source is .*{name}, expected a folder, .jsonl files"):
        look(tmp_path / name)


@pytest.mark.parametrize("name", ["gs://bucket/in.tar", "s3://bucket/in.jsonl", "https://host.invalid/in.tar"])
def test_a_source_without_its_driver(name: str) -> None:
    with pytest.raises(InputError, match=r"source is .*, which cannot be opened .*pip install 'etils\[epath-"):
        open_source(name)


def test_what_is_not_wanted_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        write_rows(tmp_path / f"{name}.jsonl", [{"picture": f"{name}{row}.png"} for row in range(10)])
    source = open_source(str(tmp_path / "*.jsonl"))
    assert source.survey().rows == 30
    opened, read = list[str](), lines._lines
    monkeypatch.setattr(lines, "_lines", lambda path: (opened.append(path.name), read(path))[1])
    rows = list(source.rows(Wanted([range(12, 14), range(18, 19)])))
    assert [row.values["picture"] for row in rows] == ["b2.png", "b3.png", "b8.png"]
    assert opened == ["b.jsonl"]
    assert not list(source.rows(Wanted([])))


def test_ranges_of_rows_answer_as_their_rows_do() -> None:
    ranges = [range(3, 5), range(9, 10), range(5, 6), range(0, 0)]
    rows, wanted = {row for each in ranges for row in each}, Wanted(ranges)
    assert {row for row in range(20) if wanted(row)} == rows
    for first in range(12):
        for end in range(first + 1, 13):
            assert wanted.some(range(first, end)) == bool(rows & set(range(first, end)))
    assert (wanted.end, Wanted([]).end) == (10, 0)
