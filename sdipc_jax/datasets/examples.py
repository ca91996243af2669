"""Pictures with classes and captions: what tuning learns from, each read once and found good."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sdipc_jax.datasets.folder import Folder
from sdipc_jax.datasets.rows import EVERY_ROW, RawRow, picture_of
from sdipc_jax.datasets.sources import open_source
from sdipc_jax.errors import InputError, printable, shortened
from sdipc_jax.pictures.reading import Picture, decode_picture, read_picture
from sdipc_jax.records import Counted, Record, digest_of

_SHOWN = 20
EXAMPLE_COLUMNS = ("picture", "class", "caption")
# What they are called in WebDataset's shards and Hugging Face's image folders.
_OTHER_NAMES = {"file_name": "picture", "cls": "class", "txt": "caption", "text": "caption"}
# kohya's folders: how often its pictures are repeated, and the class.
_REPEATS = re.compile(r"\d+_(?=.)")


@dataclass(frozen=True)
class Example:
    """A picture that was read once and found good.

    Attributes:
        path: of its file, or what it is called where the data set holds it.
        size: (height, width).
        sha256: of its file.
        data: its file's bytes where the data set holds them.
        notes: what is odd about it.
    """

    path: Path
    label: str
    caption: str
    size: tuple[int, int]
    sha256: str
    data: bytes | None = None
    notes: tuple[str, ...] = ()

    def read(self) -> UInt8[np.ndarray, "H W 3"]:
        """Its pixels.

        Raises:
            InputError: the file is not what it was.
        """
        picture = _read(self.path, self.data)
        if picture.sha256 != self.sha256:
            raise InputError(
                f"{printable(self.path)}: found another picture than at the start of the run, expected the same: "
                "leave the data alone while it trains, and start again"
            )
        return picture.pixels

    def record(self) -> Record:
        """What pictures.jsonl says of it."""
        return {"picture": str(self.path), "class": self.label, "caption": self.caption, "sha256": self.sha256}


class Pictures(Sequence[np.ndarray]):
    """The pixels of examples, each read when it is asked for."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index].read()


class _Found(NamedTuple):
    """A row of the data set, its picture not read yet."""

    path: Path
    data: bytes | None
    label: str
    caption: str | None
    place: str


def find(
    data: Path,
    *,
    columns: dict[str, str] | None,
    classes: Mapping[str, str] | None,
    per_class: int | None,
    caption: str,
    needs_words: bool,
    notes: list[str],
) -> list[Example]:
    """All pictures of a data set, in the order of their classes and names.

    Args:
        data: a folder with one subfolder a class, a folder of pictures, or anything else that `open_source` reads.
        columns: which column is `picture`, `class` and `caption`; those of these names if None.
        classes: those to use and what captions call them; all under their own names if None.
        per_class: how many of each, the first by name; all if None.
        caption: of pictures without one; {} is the class.
        needs_words: every row that is in no folder must have a class or a caption.
        notes: receives what a person should know, such as what is passed over.

    Raises:
        InputError: no data, no such class, or with every picture that cannot be used.
    """
    source = open_source(str(data), None if columns is None else columns.values(), captions=True, setting="data")
    notes += source.survey().notes
    rows = [_found(row, columns) for row in source.rows(EVERY_ROW)]
    if isinstance(source, Folder):
        found = list(_of_classes(Path(data), rows, classes, notes))
    else:
        found = [_with_words(each) if needs_words else each for each in rows]
    if classes is not None:
        order = list(classes)
        missing = [name for name in order if name not in {each.label for each in found}]
        if missing:
            raise InputError(
                f"{printable(data)}: found no pictures of {', '.join(missing)}, expected every class in "
                "`classes`: correct the names"
            )
        found = sorted((each for each in found if each.label in order), key=lambda each: order.index(each.label))
    if per_class is not None:
        seen: Counter[str] = Counter()
        first = []
        for each in found:
            seen[each.label] += 1
            if seen[each.label] <= per_class:
                first.append(each)
        found = first
    if not found:
        told = "".join(f"; {note}" for note in notes)
        raise InputError(
            f"{printable(data)}: found no pictures{told}, expected a subfolder of picture files for each class: check "
            "the path"
        )
    names = {each.label: (classes or {}).get(each.label, class_name(each.label)) for each in found}
    notes += [
        f"{printable(label)} is read as {names[label]!r}: kohya's number of repeats before it is not used, each "
        "picture counts once"
        for label in names
        if isinstance(source, Folder) and _REPEATS.match(label)
    ]
    captioned = [each._replace(caption=each.caption or caption.replace("{}", names[each.label])) for each in found]
    # Decoding leaves Python to other threads.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(_example, captioned))
    bad = [each for each in read if isinstance(each, InputError)]
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise InputError(
            f"{len(bad)} of {len(read)} pictures cannot be used: {'; '.join(map(str, bad[:_SHOWN]))}{more}"
        )
    examples, odd = [each for each in read if isinstance(each, Example)], Counted()
    for example in examples:
        odd.add(printable(example.path), example.notes)
    notes += odd.lines()
    return examples


def data_digest(examples: Sequence[Example]) -> str:
    """Names the data: the same pictures with the same classes and captions in the same order."""
    return digest_of([[each.sha256, each.label, each.caption] for each in examples])


def class_name(folder: str) -> str:
    """What a folder's name says in a caption; a number before it, as in kohya's folders, says nothing.

    >>> class_name("wet_bar"), class_name("10_sks dog")
    ('wet bar', 'sks dog')
    """
    return _REPEATS.sub("", folder, count=1).replace("_", " ").strip()


def _read(path: Path, data: bytes | None) -> Picture:
    return read_picture(path) if data is None else decode_picture(data, path)


def _example(found: _Found) -> Example | InputError:
    try:
        picture = _read(found.path, found.data)
    except InputError as error:
        return InputError(shortened(f"{found.place}: {error}" if found.place else str(error)))
    height, width = picture.pixels.shape[:2]
    caption = found.caption or ""
    return Example(found.path, found.label, caption, (height, width), picture.sha256, found.data, picture.notes)


def _found(row: RawRow, columns: dict[str, str] | None) -> _Found:
    """A row's picture, class and caption.

    Raises:
        InputError: the row has others, or others than texts.
    """
    try:
        values = row.chosen(columns, _OTHER_NAMES)
        unknown = sorted(values.keys() - set(EXAMPLE_COLUMNS))
        if unknown or "picture" not in values:
            what = f"the column {unknown[0]!r}" if unknown else "no picture"
            raise InputError(
                f"found {what}, expected picture, class and caption: say which columns they are with `columns`, such "
                "as `columns: {picture: image, caption: text}`"
            )
        name, data = picture_of(values["picture"])
        label, caption = values.get("class", ""), values.get("caption")
        # Classes of other tools are numbers.
        label = str(label) if type(label) is int else label
        for each in (name, label, caption or ""):
            if not isinstance(each, str):
                raise InputError(f"found {each!r:.80}, expected texts in picture, class and caption: correct the row")
        where = row.input(name, data).where
        if not isinstance(where, bytes) and "://" in os.fspath(where):
            raise InputError(f"{printable(name)}: found an address, expected a file of this machine: fetch it first")
    except InputError as error:
        raise InputError(shortened(f"{row.place}: {error}" if row.place else str(error))) from None
    if isinstance(where, bytes):
        return _Found(Path(name), where, label, caption, row.place)
    return _Found(Path(os.fspath(where)), None, label, caption, row.place)


def _with_words(found: _Found) -> _Found:
    if not found.label and not found.caption:
        raise InputError(
            f"{found.place}: found no class and no caption, expected one of them for the text loss: add it"
        )
    return found


def _of_classes(
    folder: Path, rows: Sequence[_Found], classes: Mapping[str, str] | None, notes: list[str]
) -> Iterator[_Found]:
    """Each picture with its subfolder's name as its class, or with the folder's own where there are no subfolders.

    Raises:
        InputError: there are pictures beside such folders, or deeper ones, so that what is meant is not clear.
    """
    parts = [each.path.relative_to(folder).parts for each in rows]
    below = Counter(part[0] for part in parts if len(part) > 1)
    beside = sum(len(part) == 1 for part in parts)
    named = below if classes is None else [name for name in below if name in classes]
    if below and beside and not named:
        named = below
    if beside and below and (classes is None or named is below):
        counts = ", ".join(f"{printable(name)} with {count}" for name, count in list(below.items())[:5])
        raise InputError(
            f"{printable(folder)}: found {beside} pictures beside the folder {counts}, expected pictures alone or one "
            "subfolder for each class: move one or the other away, or name the folders that are meant in `classes`"
        )
    deep = next((part for part in parts if len(part) > 2 and part[0] in named), None)
    if deep is not None:
        raise InputError(
            f"{printable(folder)}: found pictures in {printable('/'.join(deep[:-1]))}, expected one subfolder for each "
            "class with pictures in it: move them, or name the folder that holds the classes as `data`"
        )
    if beside and below:
        notes.append(f"{beside} pictures beside the classes' folders are not taken")
    for each, part in zip(rows, parts, strict=True):
        if len(part) > 1:
            yield each._replace(label=part[0])
        elif not below:
            yield each._replace(label=folder.resolve().name)
