"""Pictures with classes and captions: what tuning learns from, each read once and found good."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.records import Record, digest_of

# Files without such a name are taken for something else, and passed over.
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"}
_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """A picture that was read once and found good.

    Attributes:
        size: (height, width).
        sha256: of its file.
    """

    path: Path
    label: str
    caption: str
    size: tuple[int, int]
    sha256: str

    def read(self) -> UInt8[np.ndarray, "H W 3"]:
        """Its pixels.

        Raises:
            InputError: the file is not what it was.
        """
        picture = read_picture(self.path)
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


def find(
    data: Path, *, classes: Mapping[str, str] | None, per_class: int | None, caption: str, needs_words: bool
) -> list[Example]:
    """All pictures of a data set, in the order of their classes and names.

    Args:
        data: a folder with one subfolder a class, a folder of pictures, or a .jsonl file.
        classes: those to use and what captions call them; all under their own names if None.
        per_class: how many of each, the first by name; all if None.
        caption: of pictures without one; {} is the class.
        needs_words: every line of a .jsonl file must have a class or a caption.

    Raises:
        InputError: no data, no such class, or with every picture that cannot be used.
    """
    found = _from_lines(data, needs_words) if data.suffix == ".jsonl" else _from_folder(data, classes)
    if classes is not None:
        order = list(classes)
        missing = [name for name in order if name not in {label for _, label, _ in found}]
        if missing:
            raise InputError(
                f"{printable(data)}: found no pictures of {', '.join(missing)}, expected every class in "
                "`classes`: correct the names"
            )
        found = sorted((each for each in found if each[1] in order), key=lambda each: order.index(each[1]))
    if per_class is not None:
        seen: Counter[str] = Counter()
        first = []
        for each in found:
            seen[each[1]] += 1
            if seen[each[1]] <= per_class:
                first.append(each)
        found = first
    if not found:
        raise InputError(
            f"{printable(data)}: found no pictures, expected a subfolder of JPEG, PNG or WebP files for each "
            "class: check the path"
        )
    names = {label: (classes or {}).get(label, class_name(label)) for _, label, _ in found}
    captioned = [(path, label, own or caption.replace("{}", names[label])) for path, label, own in found]
    # Decoding leaves Python to other threads.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(lambda each: _read(*each), captioned))
    bad = [each for each in read if isinstance(each, InputError)]
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise InputError(
            f"{len(bad)} of {len(read)} pictures cannot be used: {'; '.join(map(str, bad[:_SHOWN]))}{more}"
        )
    return [each for each in read if isinstance(each, Example)]


def data_digest(examples: Sequence[Example]) -> str:
    """Names the data: the same pictures with the same classes and captions in the same order."""
    return digest_of([[each.sha256, each.label, each.caption] for each in examples])


def class_name(folder: str) -> str:
    """What a folder's name says in a caption.

    >>> class_name("wet_bar")
    'wet bar'
    """
    return folder.replace("_", " ").strip()


def _read(path: Path, label: str, caption: str) -> Example | InputError:
    try:
        picture = read_picture(path)
    except InputError as error:
        return error
    height, width = picture.pixels.shape[:2]
    return Example(path, label, caption, (height, width), picture.sha256)


def _from_folder(folder: Path, classes: Mapping[str, str] | None) -> list[tuple[Path, str, str | None]]:
    try:
        subfolders = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
        return [
            (path, each.name, None)
            for each in subfolders or [folder.resolve()]
            if classes is None or each.name in classes
            for path in sorted(each.iterdir())
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        ]
    except OSError as error:
        raise InputError(
            f"{printable(folder)}: {error.strerror}, expected a folder with one subfolder of pictures for each class, "
            "or a .jsonl file: check the path"
        ) from None


def _from_lines(file: Path, needs_words: bool) -> list[tuple[Path, str, str | None]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(file)}: {reason}, expected JSON lines in UTF-8: check the file") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{printable(file)}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{where}: found no JSON, expected an object with picture, class and caption") from None
        if not isinstance(row, dict) or not row.keys() <= {"picture", "class", "caption"} or "picture" not in row:
            raise InputError(f"{where}: found {line[:80]}, expected an object with picture, class and caption")
        if not all(isinstance(value, str) for value in row.values()):
            raise InputError(f"{where}: found {line[:80]}, expected texts in picture, class and caption")
        if "class" not in row and "caption" not in row and needs_words:
            raise InputError(f"{where}: found no class and no caption, expected one of them for the text loss: add it")
        found.append((file.parent / row["picture"], row.get("class", ""), row.get("caption")))
    return found
