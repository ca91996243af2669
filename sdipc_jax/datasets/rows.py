"""A row of a data set: as it stands there, and as the settings and pictures that it asks for."""

import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self
from urllib.parse import unquote, urlsplit

from etils import epath
from pydantic import Field, model_validator

from sdipc_jax.datasets.controls import Paths, RowControls
from sdipc_jax.errors import InputError, printable
from sdipc_jax.settings import Alpha, Finite, Seed, Side, SizeSettings, Text

_Path = Annotated[str, Field(min_length=1)]

# What the columns of Hugging Face's image folders are called here.
OTHER_NAMES = {"file_name": "picture"}
# A row's settings that are pictures, besides those that it is about: one, or several.
_ONE, _SEVERAL = ("init_image", "mask_image"), ("without_picture", "negative_picture", "mask", "control_image")
OTHER_PICTURES = (*_ONE, *_SEVERAL)


class Row(SizeSettings, RowControls):
    """A row of the data set."""

    picture: _Path | None = None
    """A picture's path, relative to the file that names it."""
    pictures: tuple[_Path, ...] = ()
    """Or several, whose vectors are averaged."""
    weights: tuple[Finite, ...] = ()
    """Of the pictures in that average; as many, and with a sum that is not 0."""
    text: Text | None = None
    """What to change (eq. 8), instead of the job's text; empty changes nothing."""
    alpha: Alpha | None = None
    """Weight of the text."""
    negative_prompt: Text | None = None
    """What guidance leads away from."""
    seed: Seed | None = None
    """Gives variation 0 of this seed. Without it the row's id numbers a variation of the job's seed."""
    height: Side | None = None
    """One of the job's sizes."""
    width: Side | None = None
    """One of the job's sizes."""
    mask: Paths = ()
    """Pictures that are white where each picture counts: one, or with several pictures one for each, which are then not
    averaged but weighted, each in its place."""
    without_picture: Paths = ()
    """Pictures to project out of the pictures' mean."""
    negative_picture: Paths = ()
    """Pictures that guidance leads away from, in the place of the negative prompt."""
    init_image: _Path | None = None
    """A picture to start from; with `strength` alone that is the picture itself."""
    mask_image: _Path | None = None
    """A picture that is white where the picture that is started from is redone."""
    control_image: Paths = ()
    """What each of the job's ControlNets is shown."""

    @model_validator(mode="after")
    def _pictures_and_weights(self) -> Self:
        if (self.picture is None) != bool(self.pictures):
            raise ValueError("found both or neither of picture and pictures, expected one of them: name the picture")
        if self.weights and len(self.weights) != len(self.names):
            raise ValueError(
                f"found {len(self.weights)} weights for {len(self.names)} pictures, expected as many: correct them"
            )
        if self.mask and len(self.mask) != len(self.names):
            raise ValueError(
                f"found {len(self.mask)} masks for {len(self.names)} pictures, expected as many or none: correct them"
            )
        if self.weights and len(self.mask) < 2 and not abs(sum(self.weights)) > 1e-6 * sum(map(abs, self.weights)):
            raise ValueError(f"weights are {list(self.weights)}, expected a sum that is not 0: correct them")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The pictures' paths."""
        return self.pictures or (self.picture or "",)


@dataclass(frozen=True)
class Input:
    """A picture, not read yet.

    Attributes:
        name: as the data set names it: the same wherever the data set lies.
        where: its path, or its bytes where the data set holds them.
        role: the row's setting that it is, `picture` for all that the row is about.
    """

    name: str
    where: epath.Path | bytes
    role: str = "picture"


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in the data set.

    Attributes:
        number: its place in the job, from 0.
        values: its columns, unchecked.
        base: the folder that its paths start from; None where no paths can be read.
        place: where it stands, such as `rows.jsonl, line 3`; empty where its picture's name says it.
        error: why it cannot be read at all.
    """

    number: int
    values: dict[str, Any]
    base: epath.Path | None = None
    place: str = ""
    error: str | None = None

    def chosen(self, columns: dict[str, str] | None, others: Mapping[str, str] = OTHER_NAMES) -> dict[str, Any]:
        """Its settings, unchecked: those columns that are asked for under the settings' names, and none that is null.

        Args:
            others: what columns of other names are where `columns` is None, if none has the right name.

        Raises:
            InputError: it cannot be read, or lacks a column.
        """
        if self.error is not None:
            raise InputError(self.error)
        if columns is None:
            values = {name: self.values[column] for column, name in standard_names(self.values, others).items()}
        else:
            missing = [column for column in columns.values() if column not in self.values]
            if missing:
                there = ", ".join(printable(name) for name in self.values) or "none"
                raise InputError(
                    f"found no column {missing[0]!r}, expected one as `columns` says; there are {there}: correct the "
                    "row"
                )
            values = {name: self.values[column] for name, column in columns.items()}
        return {name: value for name, value in values.items() if value is not None}

    def parse(self, columns: dict[str, str] | None) -> tuple[Row, list[Input]]:
        """Its settings and pictures, first those that it is about.

        Raises:
            InputError: they are not what a row can hold.
        """
        values, found = self.chosen(columns), dict[str, list[tuple[Any, bytes | None]]]()
        for role in ("picture", "pictures", *OTHER_PICTURES):
            value = values.get(role)
            single = role in ("picture", *_ONE) or (role in _SEVERAL and not _are_several(value))
            given = [value] if single else value
            if value is None or not isinstance(given, list | tuple):
                continue
            found[role] = pictures = [picture_of(value) for value in given]
            # The schema judges names as they can be shown: those from a disk need not be valid Unicode.
            shown = [printable(name) if isinstance(name, str) else name for name, _ in pictures]
            values[role] = shown[0] if single else shown
        for name, value in values.items():
            if isinstance(value, bytes):
                raise InputError(f"{name} is {len(value)} bytes that are no text, expected one: correct the row")
        row = Row(**values)
        return row, [
            self.input(name, data, "picture" if role == "pictures" else role)
            for role, pictures in found.items()
            for name, data in pictures
        ]

    def input(self, name: str, data: bytes | None, role: str = "picture") -> Input:
        """A picture of the row.

        Raises:
            InputError: it is a path where none can be, or an address that cannot be opened here.
        """
        if data is not None:
            return Input(name, data, role)
        if self.base is None:
            raise InputError(f"found the path {name!r}, expected the picture's bytes: correct the row")
        return Input(name, _at(self.base, name), role)


class Wanted:
    """Rows that are wanted: ranges of their numbers, no two of which overlap.

    >>> wanted = Wanted([range(10, 12), range(4, 6)])
    >>> wanted(5), wanted(6), wanted.some(range(6, 11)), wanted.some(range(6, 10)), wanted.end
    (True, False, True, False, 12)

    Attributes:
        end: no row from here on is wanted.
    """

    def __init__(self, ranges: Iterable[range]) -> None:
        self._ranges = sorted(filter(None, ranges), key=lambda each: each.start)
        self._starts = [each.start for each in self._ranges]
        self.end = self._ranges[-1].stop if self._ranges else 0

    def __call__(self, row: int) -> bool:
        """Whether a row is."""
        return self.some(range(row, row + 1))

    def some(self, rows: range) -> bool:
        """Whether one of some rows is, without looking at each."""
        before = bisect_left(self._starts, rows.stop)
        return before > 0 and self._ranges[before - 1].stop > rows.start


EVERY_ROW = Wanted([range(sys.maxsize)])


@dataclass(frozen=True)
class Survey:
    """What a look at the whole data set tells, without its pictures.

    Attributes:
        sha256: tells whether it is the same as before.
        rows: how many, with one for what is lost of each damaged file.
        damaged: the files that are, each with what is wrong.
        notes: what a person should know, such as what was passed over.
        size: bytes that are read for all rows, those of pictures in files of their own left out.
    """

    sha256: str
    rows: int
    damaged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    size: int = 0


class Source(Protocol):
    """A data set. Rows have an order, and the same one every time."""

    def survey(self) -> Survey:
        """Looks at all of it.

        Raises:
            InputError: nothing of it can be read.
        """
        ...

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        """The rows whose numbers are wanted, in order. What is not wanted is passed over as cheaply as can be. What
        cannot be read any more is a row with an error: as many come as the survey has counted."""
        ...


def standard_names(columns: Iterable[str], others: Mapping[str, str] = OTHER_NAMES) -> dict[str, str]:
    """The setting that each column is where nobody says, by its own name or by another; what is none keeps its name."""
    found = list(columns)
    taken = set(found)
    names = {}
    for column in found:
        name = others.get(column, column)
        names[column] = column if column != name and name in taken else name
        taken.add(names[column])
    return names


def picture_of(value: Any) -> tuple[Any, bytes | None]:
    """The name and the bytes in a column: a path, bytes, their numbers, or a struct that has `bytes` or `path`."""
    name: Any = "picture"
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        name, value = value.get("path") or name, value.get("bytes")
        if value is None or isinstance(value, str):
            return name, None
    if _is_bytes(value):
        value = bytes(value)
    return (name, value) if isinstance(value, bytes) else (value, None)


def _is_bytes(value: Any) -> bool:
    """Whether this is a list of the numbers of bytes."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, int) and 0 <= each < 256 for each in value)


def _are_several(value: Any) -> bool:
    return isinstance(value, list | tuple) and not _is_bytes(value)


def missing_rows(wanted: Wanted, numbers: Iterable[int], place: str, reason: str) -> Iterator[RawRow]:
    """Rows that were counted and cannot be read: each that is wanted, with the reason."""
    for number in numbers:
        if wanted(number):
            yield RawRow(number, {}, place=place, error=reason)


def _at(base: epath.Path, name: str) -> epath.Path:
    scheme, separator, _ = name.partition("://")
    if not separator:
        return base / name
    try:
        return epath.Path(unquote(urlsplit(name).path) if scheme == "file" else name)
    except Exception as error:  # A KeyError for what etils does not know, and whatever its back ends raise.
        reason = "" if isinstance(error, KeyError) else f" ({error})"
        raise InputError(
            f"{printable(name)}: found an address of {printable(scheme)}://{reason}, expected a path, or gs:// or "
            "s3:// with pip install 'etils[epath-gcs]' or 'etils[epath-s3]': fetch the picture first and name the file"
        ) from None
