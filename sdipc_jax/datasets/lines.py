"""JSON lines in, rows out."""

import hashlib
from collections.abc import Iterator, Sequence

from etils import epath

from sdipc_jax.datasets.rows import RawRow, Survey, Wanted, missing_rows
from sdipc_jax.datasets.rules import object_of
from sdipc_jax.errors import InputError, printable

_LONGEST_LINE = 10_000_000


class JsonLines:
    """A JSON object a line, with the settings of a row. Lines end at \\n alone, and empty ones are passed over."""

    def __init__(self, paths: Sequence[epath.Path]) -> None:
        self.paths = paths
        self._counts: list[int] | None = None

    def survey(self) -> Survey:
        digest, counts, notes = hashlib.sha256(), list[int](), list[str]()
        for path in self.paths:
            count, line = 0, b""
            try:
                for _, line in _lines(path):
                    digest.update(line)
                    count += bool(line.strip())
            except OSError as error:
                raise InputError(
                    f"{printable(path)}: {error.strerror or error}, expected JSON lines that can be read: check "
                    "the path"
                ) from None
            counts.append(count)
            if not count:
                notes.append(f"{printable(path.name)} has no rows")
            elif not line.endswith(b"\n"):
                notes.append(f"{printable(path.name)}: its last line has no end, so that there may have been more")
        self._counts = counts
        return Survey(digest.hexdigest(), sum(counts), notes=tuple(notes))

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        first = 0
        for path, count in zip(self.paths, self._counts or [0] * len(self.paths), strict=True):
            number, reason = first, "the file is shorter than it was"
            if self._counts and not wanted.some(range(first, first + count)):
                first += count
                continue
            try:
                for place, line in _lines(path):
                    if not line.strip() or (self._counts and number == first + count):
                        continue
                    if number >= wanted.end:
                        return
                    if wanted(number):
                        yield _row(number, path, place, line)
                    number += 1
            except OSError as error:
                reason = str(error.strerror or error)
            found = f"{printable(path.name)}: {reason}, expected it as it was when its rows were counted: start again"
            yield from missing_rows(wanted, range(number, first + count), printable(path.name), found)
            first = max(number, first + count)


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers from 1; of one that is too long, so much that it is seen to be."""
    number = 0
    with path.open("rb") as stream:
        while line := stream.readline(_LONGEST_LINE):
            number += 1
            yield number, line
            while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                line = stream.readline(_LONGEST_LINE)


def _row(number: int, path: epath.Path, place: int, line: bytes) -> RawRow:
    where = f"{printable(path.name)}, line {place}"
    if len(line) == _LONGEST_LINE:
        reason = f"found a line of more than {_LONGEST_LINE} bytes, expected a JSON object a line: write it anew"
        return RawRow(number, {}, place=where, error=reason)
    try:
        return RawRow(number, object_of(line), path.parent, where)
    except InputError as error:
        return RawRow(number, {}, place=where, error=str(error))
