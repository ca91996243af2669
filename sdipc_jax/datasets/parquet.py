"""Parquet files in, rows out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath

from sdipc_jax.datasets.files import digest_of_files, only_damaged
from sdipc_jax.datasets.footer import rows_of_groups
from sdipc_jax.datasets.rows import RawRow, Survey, Wanted, missing_rows
from sdipc_jax.errors import InputError, printable, shortened

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class _File:
    """A file, as its footer shows it.

    Attributes:
        groups: the rows of each group; one row in all where the file cannot be opened.
    """

    path: epath.Path
    length: int
    groups: tuple[int, ...]
    columns: tuple[str, ...] = ()
    damage: str | None = None

    @property
    def name(self) -> str:
        return printable(self.path.name)


class ParquetFiles:
    """Parquet files, 64 rows at a time; pictures are binary columns, structs with `bytes`, or paths beside the file.

    Args:
        columns: which columns are read; all if None.
    """

    def __init__(self, paths: Sequence[epath.Path], columns: frozenset[str] | None) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise InputError(
                "reading Parquet takes pyarrow, which is not installed: pip install 'sdipc-jax[parquet]'"
            ) from None
        self.paths, self.columns = paths, columns
        self._parquet = pyarrow.parquet.ParquetFile

    def _open(self, stream: Any) -> Any:
        return self._parquet(stream, page_checksum_verification=True)

    @cached_property
    def _files(self) -> list[_File]:
        return [self._look(path) for path in self.paths]

    def survey(self) -> Survey:
        files = self._files
        damaged = tuple(f"{file.name}: {file.damage}" for file in files if file.damage is not None)
        rows = sum(sum(file.groups) for file in files)
        only_damaged(damaged, rows)
        whole = [file for file in files if file.damage is None]
        absent = sorted(name for name in self.columns or () if not any(name in file.columns for file in whole))
        if absent and whole:
            raise InputError(
                f"{whole[0].name}: found no column {absent[0]!r}, expected it as `columns` says; there are "
                f"{', '.join(map(printable, whole[0].columns))}: correct `columns`"
            )
        notes = tuple(f"{file.name} has no rows" for file in files if not sum(file.groups))
        return Survey(digest_of_files(self.paths), rows, damaged, notes, sum(file.length for file in files))

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        first = 0
        for file in self._files:
            count = sum(file.groups)
            if file.damage is not None:
                reason = (
                    f"{file.name}: {file.damage}, expected a whole Parquet file; all its rows are lost: get it again"
                )
                yield from missing_rows(wanted, [first], file.name, reason)
            elif wanted.some(range(first, first + count)):
                yield from self._rows(file, first, wanted)
            first += count

    def _rows(self, file: _File, first: int, wanted: Wanted) -> Iterator[RawRow]:
        group_first, reason = first, "it cannot be opened any more"
        try:
            with file.path.open("rb") as stream, self._open(stream) as opened:
                for group, count in enumerate(file.groups):
                    numbers = range(group_first, group_first + count)
                    if wanted.some(numbers):
                        yield from self._group(file, opened, group, first, numbers, wanted)
                    group_first += count
        except Exception as error:  # Whatever pyarrow and storage raise.
            reason = _reason(error)
        found = f"{file.name}: {reason}, expected it as it was when its rows were counted: start again"
        yield from missing_rows(wanted, range(group_first, first + sum(file.groups)), file.name, found)

    def _group(
        self, file: _File, opened: Any, group: int, first: int, numbers: range, wanted: Wanted
    ) -> Iterator[RawRow]:
        """The rows of a group; those that cannot be read have an error."""
        number, reason = numbers.start, "found fewer rows than its footer says"
        present = None if self.columns is None else [name for name in file.columns if name in self.columns]
        if present == []:
            for row in numbers:
                if wanted(row):
                    yield RawRow(row, {}, file.path.parent, _place(file, row - first))
            return
        batches = opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=present)
        while number < numbers.stop:
            try:
                batch = next(batches, None)
            except Exception as error:  # Of damaged pages, whatever they make of the decoders.
                reason, batch = _reason(error), None
            if batch is None:
                break
            for place in range(min(batch.num_rows, numbers.stop - number)):
                if wanted(number):
                    yield _row(number, file, number - first, batch, place)
                number += 1
        found = f"{file.name}: row group {group} is damaged ({reason}), expected a whole one: get the file again"
        for lost in missing_rows(wanted, range(number, numbers.stop), file.name, found):
            yield RawRow(lost.number, {}, place=_place(file, lost.number - first), error=lost.error)

    def _look(self, path: epath.Path) -> _File:
        length = 0
        try:
            length = path.stat().length
            with path.open("rb") as stream:
                groups = rows_of_groups(stream, length)
                stream.seek(0)
                with self._open(stream) as file:
                    return _File(path, length, groups, tuple(file.schema_arrow.names))
        except Exception as error:  # Whatever pyarrow and storage raise, and a footer without what it must have.
            reason = "its footer is damaged" if isinstance(error, LookupError | TypeError) else _reason(error)
            return _File(path, length, (1,), damage=f"found a damaged Parquet file ({reason})")


def _row(number: int, file: _File, place: int, batch: Any, index: int) -> RawRow:
    where = _place(file, place)
    try:
        return RawRow(number, batch.slice(index, 1).to_pylist()[0], file.path.parent, where)
    except Exception as error:  # Of damaged pages: texts that are none, dates of no calendar.
        return RawRow(number, {}, place=where, error=f"found no readable row ({_reason(error)}): get the file again")


def _place(file: _File, row: int) -> str:
    return f"{file.name}, row {row}"


def _reason(error: Exception) -> str:
    return shortened(" ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__, 150)
