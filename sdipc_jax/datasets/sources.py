"""Data sets, read row by row: a folder, JSON lines, tar shards, Parquet. Nothing is held in memory but a row."""

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from sdipc_jax.datasets.rows import RawRow
from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.reading import MAX_BYTES

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LONGEST_LINE = 10_000_000

Wanted = Callable[[int], bool]


class Source(Protocol):
    """A data set. Rows have an order, and the same one every time."""

    def fingerprint(self) -> tuple[str, int]:
        """What tells whether the data set is the same as before, and its number of rows."""
        ...

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        """The rows whose numbers are wanted, in order. What is not wanted is passed over as cheaply as can be."""
        ...


def open_source(source: str | Sequence[str], columns: dict[str, str] | None = None) -> Source:
    """A data set.

    Args:
        source: paths, in which `*` and `{00..07}` stand for several.
        columns: which of a row's settings each column is; the others need not be read.

    Raises:
        InputError: there is none, or of no kind that is known here.
    """
    names = (source,) if isinstance(source, str) else source
    paths = [path for name in names for path in _expand(name)]
    suffixes = {path.suffix.lower() for path in paths}
    if len(paths) == 1 and paths[0].is_dir():
        return Folder(paths[0])
    if suffixes == {".jsonl"} and len(paths) == 1:
        return JsonLines(paths[0])
    if suffixes == {".tar"}:
        return Tars(paths)
    if suffixes == {".parquet"}:
        return ParquetFiles(paths, columns)
    raise InputError(
        f"source is {printable(names[0])}, expected a folder, a .jsonl file, .tar files or .parquet files: name one"
    )


class Folder:
    """Every picture below a folder, by its name's ending, in the order of the names; links to folders are not
    followed."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path

    def fingerprint(self) -> tuple[str, int]:
        digest, count = hashlib.sha256(), 0
        for count, name in enumerate(self._names(self.path, ""), 1):  # noqa: B007
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest(), count

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        for number, name in enumerate(self._names(self.path, "")):
            if wanted(number):
                yield RawRow(number, {"picture": name}, self.path)

    def _names(self, folder: epath.Path, prefix: str) -> Iterator[str]:
        for entry in sorted(folder.iterdir(), key=lambda path: path.name):
            if entry.suffix.lower() in SUFFIXES:
                yield prefix + entry.name
            elif entry.is_dir() and not os.path.islink(entry):
                yield from self._names(entry, f"{prefix}{entry.name}/")


class JsonLines:
    """A JSON object a line, with the settings of a row; empty lines are passed over."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path

    def fingerprint(self) -> tuple[str, int]:
        digest, count = hashlib.sha256(), 0
        for line in self._lines():
            digest.update(line)
            count += bool(line.strip())
        return digest.hexdigest(), count

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        for number, line in enumerate(line for line in self._lines() if line.strip()):
            if wanted(number):
                yield self._row(number, line)

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            while line := stream.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise InputError(
                        f"{printable(self.path)}: found a line of more than {_LONGEST_LINE} bytes, expected a JSON "
                        "object a line: write it anew"
                    )
                yield line

    def _row(self, number: int, line: bytes) -> RawRow:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            return RawRow(number, {}, error=f"found no JSON ({error}), expected an object: correct the line")
        if not isinstance(values, dict):
            return RawRow(
                number, {}, error=f"found a JSON {type(values).__name__}, expected an object: correct the line"
            )
        return RawRow(number, values, self.path.parent)


class Tars:
    """WebDataset's shards: files that share a name up to its first dot are a row.

    The picture is its .jpg, .jpeg, .png or .webp, its .json holds the row's settings, and other files are columns of
    text under the name of their ending. Nothing is unpacked.
    """

    def __init__(self, paths: Sequence[epath.Path]) -> None:
        self.paths = paths

    def fingerprint(self) -> tuple[str, int]:
        self._counts = [sum(1 for _ in self._samples(path)) for path in self.paths]
        return _digest_of_files(self.paths), sum(self._counts)

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        first = 0
        for path, count in zip(self.paths, self._counts, strict=True):
            if any(map(wanted, range(first, first + count))):
                for number, (archive, members) in enumerate(self._samples(path), first):
                    if wanted(number):
                        yield self._row(number, path, archive, members)
            first += count

    def _samples(self, path: epath.Path) -> Iterator[tuple[tarfile.TarFile, list[tarfile.TarInfo]]]:
        with path.open("rb") as stream:
            try:
                # Never extracted: members' names and links reach no file system.
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    files = (member for member in _members(archive) if member.isfile())
                    for _, members in itertools.groupby(files, key=lambda member: _split(member.name)[0]):
                        yield archive, list(members)
            except tarfile.TarError as error:
                raise InputError(
                    f"{printable(path)}: found a damaged tar file ({error}), expected a whole one: get it again"
                ) from None

    def _row(self, number: int, path: epath.Path, archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> RawRow:
        values: dict[str, Any] = {}
        for member in members:
            suffix = _split(member.name)[1]
            name = f"{printable(path.name)}:{printable(member.name)}"
            if member.size > MAX_BYTES:
                return RawRow(number, {}, error=f"{name}: found more than {MAX_BYTES} bytes: scale the picture down")
            stream = archive.extractfile(member)
            data = b"" if stream is None else stream.read()
            if f".{suffix}" in SUFFIXES:
                values["picture"] = {"bytes": data, "path": name}
                continue
            try:
                text = data.decode()
                more = json.loads(text) if suffix == "json" else {suffix: text}
                if not isinstance(more, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                return RawRow(number, {}, error=f"{name}: found no readable text ({error}): correct it")
            values |= more
        return RawRow(number, values)


class ParquetFiles:
    """Parquet files, 64 rows at a time; pictures are binary columns, {bytes, path}, or paths beside the file."""

    _ROWS_AT_ONCE = 64

    def __init__(self, paths: Sequence[epath.Path], columns: dict[str, str] | None) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise InputError(
                "reading Parquet takes pyarrow, which is not installed: pip install 'sdipc-jax[parquet]'"
            ) from None
        self.paths, self.open = paths, pyarrow.parquet.ParquetFile
        self.columns = None if columns is None else sorted(set(columns.values()))

    def fingerprint(self) -> tuple[str, int]:
        self._counts = []
        for path in self.paths:
            with path.open("rb") as stream, self.open(stream) as file:
                groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
                absent = [name for name in self.columns or () if name not in file.schema_arrow.names]
            if absent:
                raise InputError(
                    f"{printable(path)}: found no column {absent[0]!r}, expected it as `columns` says; there are "
                    f"{', '.join(file.schema_arrow.names)}: correct `columns`"
                )
            self._counts.append(groups)
        return _digest_of_files(self.paths), sum(map(sum, self._counts))

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        first = 0
        for path, groups in zip(self.paths, self._counts, strict=True):
            with path.open("rb") as stream, self.open(stream) as file:
                for group, count in enumerate(groups):
                    if any(map(wanted, range(first, first + count))):
                        yield from self._group(file, group, first, wanted, path.parent)
                    first += count

    def _group(self, file: Any, group: int, first: int, wanted: Wanted, base: epath.Path) -> Iterator[RawRow]:
        number = itertools.count(first)
        for batch in file.iter_batches(self._ROWS_AT_ONCE, row_groups=[group], columns=self.columns):
            for place, row in zip(range(batch.num_rows), number, strict=False):
                if wanted(row):
                    yield RawRow(row, batch.slice(place, 1).to_pylist()[0], base)


def _expand(name: str) -> list[epath.Path]:
    """The paths that a name with `{00..07}` and `*` stands for."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match:
        first, last = match.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        return [path for number in numbers for path in _expand(name[: match.start()] + number + name[match.end() :])]
    path = epath.Path(name)
    found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path][: path.exists()]
    if not found:
        raise InputError(f"source is {printable(name)}, but nothing is there: check the path")
    return found


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members one by one; a TarFile would keep them all."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        yield member


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key and the lower-case rest after the base name's first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _digest_of_files(paths: Sequence[epath.Path]) -> str:
    """By names and sizes: to read them all takes as long as the job's own reading."""
    lines = "".join(f"{path.name} {path.stat().length}\n" for path in paths)
    return hashlib.sha256(os.fsencode(lines)).hexdigest()
