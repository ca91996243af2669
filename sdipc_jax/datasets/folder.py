"""Folders of pictures in, rows out; also Hugging Face's image folders, whose rows stand in a file."""

import dataclasses
import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any

from etils import epath

from sdipc_jax.datasets.lines import JsonLines
from sdipc_jax.datasets.rows import EVERY_ROW, RawRow, Survey, Wanted
from sdipc_jax.datasets.rules import ENDINGS, HEAD, LINKED, ending_of, is_picture, kind, passed_over, text_of, told
from sdipc_jax.errors import InputError, printable

CAPTION = "txt"
_TEXT = f".{CAPTION}"
_LONGEST_TEXT = 1_000_000
METADATA = "metadata.jsonl"
_OTHER_METADATA = ("metadata.csv", "metadata.parquet")


class Folder:
    """Every picture below a folder, in the order of the names; links to folders are not followed.

    A text file beside a picture, of the same name but for its ending, is the row's column `txt`.

    Args:
        captions: whether those texts are read.
    """

    def __init__(self, path: epath.Path, captions: bool) -> None:
        self.path, self.captions = path, captions

    def survey(self) -> Survey:
        digest, count, captioned, passed = hashlib.sha256(), 0, 0, Counter[str]()
        for name, caption in self.pictures(passed):
            digest.update(os.fsencode(name) + b"\0")
            count += 1
            captioned += caption is not None
        notes = told(passed)
        if captioned:
            how = "" if self.captions else ", which are not read: name their column, `txt`, in `columns`"
            notes = (f"{captioned} of {count} pictures have a text of the same name beside them{how}", *notes)
        return Survey(digest.hexdigest(), count, notes=notes)

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        for number, (name, caption) in enumerate(self.pictures(Counter())):
            if number >= wanted.end:
                return
            if wanted(number):
                yield self._row(number, name, caption if self.captions else None)

    def pictures(self, passed: Counter[str]) -> Iterator[tuple[str, epath.Path | None]]:
        """The pictures' names, from the folder, each with its text's file; what is passed over is counted."""
        return self._pictures(self.path, "", passed)

    def _pictures(
        self, folder: epath.Path, prefix: str, passed: Counter[str]
    ) -> Iterator[tuple[str, epath.Path | None]]:
        try:
            entries = sorted(folder.iterdir(), key=lambda path: path.name)
        except OSError as error:
            raise InputError(
                f"{printable(folder)}: {error.strerror or error}, expected a folder that can be read: check its rights"
            ) from None
        _check_metadata(folder, prefix, {entry.name for entry in entries})
        texts = {_stem(entry.name): entry for entry in entries if ending_of(entry.name) == _TEXT}
        used = set[str]()
        for entry in entries:
            ending, reason = ending_of(entry.name), passed_over(entry.name)
            if reason is not None:
                passed[reason] += 1
            elif ending in ENDINGS or (ending != _TEXT and _shows_picture(entry)):
                text = texts.get(_stem(entry.name))
                used.update(() if text is None else (text.name,))
                yield prefix + entry.name, text
            elif not entry.is_dir():
                passed[kind(entry.name)] += 1
            elif os.path.islink(entry):
                passed[LINKED] += 1
            else:
                yield from self._pictures(entry, f"{prefix}{entry.name}/", passed)
        # They were counted with what is not taken.
        passed[_TEXT] -= len(used)

    def _row(self, number: int, name: str, caption: epath.Path | None) -> RawRow:
        values: dict[str, Any] = {"picture": name}
        if caption is not None:
            try:
                values[CAPTION] = _text(caption)
            except InputError as error:
                return RawRow(number, values, self.path, error=str(error))
        return RawRow(number, values, self.path)


class ImageFolder:
    """Hugging Face's folder of pictures: each line of its metadata.jsonl is a row, whose `file_name` is the picture."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._lines = JsonLines([path / METADATA])

    def survey(self) -> Survey:
        found = self._lines.survey()
        passed = Counter[str]()
        there = {name for name, _ in Folder(self.path, captions=False).pictures(passed)}
        passed[kind(METADATA)] -= 1
        named = {self._name(row) for row in self._lines.rows(EVERY_ROW)}
        passed[f"pictures that {METADATA} does not name"] += len(there - named)
        return dataclasses.replace(found, notes=(*found.notes, *told(passed)))

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        return self._lines.rows(wanted)

    def _name(self, row: RawRow) -> str:
        name = row.values.get("file_name", row.values.get("picture"))
        return posixpath.normpath(name) if isinstance(name, str) else ""


def open_folder(path: epath.Path, captions: bool) -> Folder | ImageFolder:
    """A folder's pictures, or the rows of its metadata.jsonl where it has one."""
    return ImageFolder(path) if (path / METADATA).exists() else Folder(path, captions)


def _check_metadata(folder: epath.Path, prefix: str, names: set[str]) -> None:
    for name in _OTHER_METADATA:
        if name in names:
            raise InputError(
                f"{printable(folder / name)}: found an image folder's metadata that is not read here, expected "
                f"{METADATA}: write it as JSON lines, or move it away"
            )
    if prefix and METADATA in names:
        raise InputError(
            f"{printable(folder / METADATA)}: found an image folder below the one that was named, expected one "
            f"{METADATA} in that: name {printable(folder)} itself, or move the file away"
        )


def _shows_picture(path: epath.Path) -> bool:
    try:
        # A pipe could block for ever on opening, and to etils all is a file that is no folder.
        if "://" not in os.fspath(path) and not os.path.isfile(path):
            return False
        with path.open("rb") as stream:
            return is_picture(path.name, stream.read(HEAD))
    except OSError:
        return False


def _text(path: epath.Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(_LONGEST_TEXT + 1)
        if len(data) > _LONGEST_TEXT:
            raise InputError(f"{printable(path)}: found more than {_LONGEST_TEXT} bytes, expected a picture's text")
        return text_of(data)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(path)}: {error}, expected a picture's text in UTF-8: write it anew") from None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
