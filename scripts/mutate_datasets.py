"""Damages valid data sets in many ways and looks at what the reader makes of each.

python scripts/mutate_datasets.py --count 100000

Each mutation of a tar, JSON lines or Parquet file follows from its number: bits flipped, the end cut off, a part
repeated, or a part overwritten with zeros. What comes out is one of

- `whole`: all rows as they were,
- `refused`: the file by its name,
- `failed`: some rows, by name,
- `changed`: as many rows or more, some with other content, where the format has no checksum that would tell,
- `told`: fewer rows, and a note that says why there may be,
- `shorter`: fewer rows in a file that is a valid data set itself: JSON lines that were cut after a line,
- `lost`: fewer rows without a word, which must never be.
"""

import argparse
import io
import json
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from PIL import Image

from sdipc_jax.datasets.rows import EVERY_ROW, RawRow
from sdipc_jax.datasets.sources import open_source
from sdipc_jax.errors import InputError
from sdipc_jax.pictures.reading import decode_picture

ROWS = 8
_BLOCK = 512

# A picture's digest and its text.
Content = tuple[str, str | None]


@dataclass(frozen=True)
class DataSet:
    """A valid file, and which of its columns are the row's picture and text."""

    name: str
    data: bytes
    columns: dict[str, str] | None = None


def data_sets(folder: Path) -> list[DataSet]:
    """The same rows in every form; pictures that lines name are put into the folder."""
    pictures = [_png(row) for row in range(ROWS)]
    texts = [f"a drawing of {row} things" for row in range(ROWS)]
    for row, data in enumerate(pictures):
        (folder / f"{row}.png").write_bytes(data)
    lines = [json.dumps({"picture": f"{row}.png", "text": text}) + "\n" for row, text in enumerate(texts)]
    columns = {"picture": "picture", "text": "txt"}
    long = "a folder whose name takes more than a header's hundred bytes, " * 2
    table = pa.table({"image": [{"bytes": data, "path": None} for data in pictures], "txt": texts})
    return [
        DataSet("rows.jsonl", "".join(lines).encode()),
        DataSet("ustar.tar", _tar(pictures, texts, "", tarfile.USTAR_FORMAT), columns),
        DataSet("gnu.tar", _tar(pictures, texts, f"{long}/", tarfile.GNU_FORMAT), columns),
        DataSet("pax.tar", _tar(pictures, texts, f"{long}ü/", tarfile.PAX_FORMAT), columns),
        DataSet("plain.parquet", _parquet(table), {"picture": "image", "text": "txt"}),
        DataSet("checked.parquet", _parquet(table, write_page_checksum=True), {"picture": "image", "text": "txt"}),
    ]


def mutate(data: bytes, number: int) -> bytes:
    """The data with the damage that belongs to the number."""
    luck = random.Random(number)
    kind = luck.choice(["flip", "cut", "repeat", "zero"])
    if kind == "cut":
        return data[: luck.randrange(len(data))]
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(luck.choice([1, 1, 2, 8])):
            changed[luck.randrange(len(data))] ^= 1 << luck.randrange(8)
        return bytes(changed)
    first = luck.randrange(len(data))
    if luck.random() < 0.5:
        first -= first % _BLOCK
    part = data[first : first + luck.choice([1, 16, _BLOCK, 2 * _BLOCK, 4096])]
    changed[first : first + len(part)] = 2 * part if kind == "repeat" else bytes(len(part))
    return bytes(changed)


def contents(path: Path, columns: dict[str, str] | None) -> tuple[list[Content], list[str], tuple[str, ...]]:
    """What a data set gives: the rows that can be used, the reasons of those that cannot, and notes.

    Raises:
        InputError: it is refused.
    """
    source = open_source(str(path), None if columns is None else columns.values())
    survey = source.survey()
    good, failed, count = list[Content](), list[str](), 0
    for raw in source.rows(EVERY_ROW):
        assert raw.number == count
        count += 1
        try:
            good.append(_content(raw, columns))
        except InputError as error:
            failed.append(str(error))
    assert count == survey.rows
    return good, failed, (*survey.damaged, *survey.notes)


def outcome(path: Path, original: DataSet, expected: list[Content]) -> str:
    """What has come of a damaged file, as listed above."""
    try:
        good, failed, notes = contents(path, original.columns)
    except InputError as error:
        return "refused" if path.name in str(error) else "lost"
    if failed:
        return "failed"
    if good == expected:
        return "whole"
    if len(good) >= len(expected):
        return "changed"
    if notes:
        return "told"
    data = path.read_bytes()
    return "shorter" if path.suffix == ".jsonl" and data.endswith(b"\n") and original.data.startswith(data) else "lost"


def run(folder: Path, numbers: range) -> Iterator[tuple[str, int, str]]:
    """The outcome of each number, whose rest by the number of data sets says which is damaged."""
    originals = data_sets(folder)
    expected = []
    for original in originals:
        (folder / original.name).write_bytes(original.data)
        expected.append(contents(folder / original.name, original.columns)[0])
        assert len(expected[-1]) == ROWS
        assert expected[-1] == expected[0]
    for number in numbers:
        place = number % len(originals)
        original = originals[place]
        (folder / original.name).write_bytes(mutate(original.data, number))
        yield original.name, number, outcome(folder / original.name, original, expected[place])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    found: dict[str, Counter[str]] = {}
    lost = []
    with tempfile.TemporaryDirectory() as folder:
        for name, number, result in run(Path(folder), range(arguments.first, arguments.first + arguments.count)):
            found.setdefault(name, Counter())[result] += 1
            if result == "lost":
                lost.append(f"{name} {number}")
    for name, results in found.items():
        print(f"{name}: {', '.join(f'{result} {count}' for result, count in sorted(results.items()))}")
    print(f"lost: {', '.join(lost) or 'none'}")
    raise SystemExit(bool(lost))


def _content(raw: RawRow, columns: dict[str, str] | None) -> Content:
    row, [picture] = raw.parse(columns)
    where = picture.where
    data = where if isinstance(where, bytes) else _read(where)
    decode_picture(data, picture.name)
    return sha256(data).hexdigest(), row.text


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def _png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _tar(pictures: list[bytes], texts: list[str], folder: str, kind: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for row, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            for ending, data in (("png", picture), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{folder}{row:03d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _parquet(table: pa.Table, **options: bool) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=3, **options)
    return stream.getvalue()


if __name__ == "__main__":
    main()
