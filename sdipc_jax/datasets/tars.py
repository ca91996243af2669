"""WebDataset's shards in, rows out."""

import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

from etils import epath

from sdipc_jax.datasets.archive import DamagedTarError, Member, members
from sdipc_jax.datasets.files import digest_of_files, only_damaged
from sdipc_jax.datasets.rows import RawRow, Survey, Wanted, missing_rows
from sdipc_jax.datasets.rules import ENDINGS, HEAD, is_picture, object_of, passed_over, text_of, told
from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.reading import MAX_BYTES

_MOST_LINKS = 8


@dataclass(frozen=True)
class _Sample:
    """Members that share a key, one after the other.

    Attributes:
        damage: what is wrong with the archive from here on; then the members need not be all.
    """

    key: str
    members: list[Member]
    damage: str | None = None


@dataclass(frozen=True)
class _Shard:
    """An archive, as a look at its headers shows it.

    Attributes:
        rows: with one for what is lost.
        apart: keys whose members do not stand together.
    """

    path: epath.Path
    length: int
    rows: int
    damage: str | None
    apart: frozenset[str]
    passed: Counter[str]
    notes: list[str]

    @property
    def name(self) -> str:
        return printable(self.path.name)


class Tars:
    """WebDataset's shards: members that share a name up to its first dot are a row.

    Each is a column under its name's ending. That which is a picture is the column `picture`, and the values in a .json
    are columns of their own. Nothing is unpacked, and what no column asks for is not read.

    Args:
        columns: which of the columns are read; all if None.
    """

    def __init__(self, paths: Sequence[epath.Path], columns: frozenset[str] | None) -> None:
        self.paths, self.columns = paths, columns

    @cached_property
    def _shards(self) -> list[_Shard]:
        return [_look(path) for path in self.paths]

    def survey(self) -> Survey:
        shards = self._shards
        damaged = tuple(f"{shard.name}: {shard.damage}" for shard in shards if shard.damage is not None)
        only_damaged(damaged, sum(shard.rows for shard in shards))
        passed = sum((shard.passed for shard in shards), Counter[str]())
        notes = [f"{shard.name}: {note}" for shard in shards for note in shard.notes]
        notes += [f"{shard.name} has no rows" for shard in shards if not shard.rows]
        rows, size = sum(shard.rows for shard in shards), sum(shard.length for shard in shards)
        return Survey(digest_of_files(self.paths), rows, damaged, (*told(passed), *notes), size)

    def rows(self, wanted: Wanted) -> Iterator[RawRow]:
        first = 0
        for shard in self._shards:
            numbers = range(first, first + shard.rows)
            if wanted.some(numbers):
                yield from self._rows(shard, numbers, wanted)
            first += shard.rows

    def _rows(self, shard: _Shard, numbers: range, wanted: Wanted) -> Iterator[RawRow]:
        number, reason = numbers.start, "its rows are fewer than they were"
        try:
            with shard.path.open("rb") as stream:
                archive = _Archive(shard, stream)
                for sample in itertools.islice(_samples(stream, shard.length, Counter(), []), shard.rows):
                    if number >= wanted.end:
                        return
                    if wanted(number):
                        yield self._row(number, archive, sample)
                    number += 1
        except OSError as error:
            reason = str(error.strerror or error)
        found = f"{shard.name}: {reason}, expected it as it was when its rows were counted: start again"
        yield from missing_rows(wanted, range(number, numbers.stop), shard.name, found)

    def _row(self, number: int, archive: "_Archive", sample: _Sample) -> RawRow:
        place = f"{archive.shard.name}, {printable(sample.key)}" if sample.key else archive.shard.name
        try:
            if sample.damage is not None:
                raise InputError(
                    f"{archive.shard.name}: {sample.damage}, expected a whole tar file; this row and what follows in "
                    "the file are lost: get it again"
                )
            return RawRow(number, self._values(archive, sample), place=place)
        except (InputError, ValueError) as error:
            return RawRow(number, {}, place=place, error=str(error))

    def _values(self, archive: "_Archive", sample: _Sample) -> dict[str, Any]:
        """The columns of a sample.

        Raises:
            InputError: the sample is not one, or what is asked for cannot be read.
        """
        if sample.key in archive.shard.apart:
            raise InputError(
                f"found members called {printable(sample.key)} apart from each other, expected those of a row "
                "together: write the archive in the order of its names"
            )
        files = dict[str, Member]()
        for member in sample.members:
            ending = split_name(member.name)[1]
            if ending in files:
                raise InputError(
                    f"found {printable(member.name)} more than once, expected each name once: write the archive anew"
                )
            files[ending] = member
        values = dict[str, Any]()
        if self._asks_for("picture"):
            picture = _picture_among(files, archive)
            if picture is not None:
                values["picture"] = archive.value(files.pop(picture))
        for ending, member in files.items():
            if ending != "json" and self._asks_for(ending):
                values[ending] = archive.value(member)
        asked = self.columns is None or not self.columns <= values.keys()
        if "json" in files and asked:
            try:
                more = object_of(archive.read(files["json"]))
            except InputError as error:
                raise InputError(f"{archive.shard.name}:{printable(files['json'].name)}: {error}") from None
            twice = sorted(more.keys() & values.keys())
            if twice and self._asks_for(twice[0]):
                raise InputError(f"found {twice[0]!r} in the .json and beside it, expected it once: leave one out")
            values = more | values
        absent = sorted((self.columns or frozenset(["picture"])) - values.keys())
        if absent and "pictures" not in values:
            raise InputError(
                f"found no column {printable(absent[0])!r} among "
                f"{', '.join(printable(member.name) for member in sample.members)} (names are split at their first "
                "dot), expected it: see how the archive was written, or correct `columns`"
            )
        return values

    def _asks_for(self, column: str) -> bool:
        return self.columns is None or column in self.columns


class _Archive:
    """An open shard whose members are read."""

    def __init__(self, shard: _Shard, stream: IO[bytes]) -> None:
        self.shard, self._stream = shard, stream

    def read(self, member: Member, most: int = MAX_BYTES) -> bytes:
        """A member's content, also where it is a link to another.

        Raises:
            InputError: it is too large, no file, or a link to what is not there.
        """
        file = self._follow(member)
        if file.size > MAX_BYTES:
            raise InputError(f"{self._name(member)}: found more than {MAX_BYTES} bytes: scale the picture down")
        self._stream.seek(file.start)
        data = self._stream.read(min(file.size, most))
        if len(data) < min(file.size, most):
            raise OSError("it is shorter than it was")
        return data

    def value(self, member: Member) -> Any:
        """A picture with its name, else a text. What is neither is left to whoever asks for the column."""
        data = self.read(member)
        if f".{split_name(member.name)[1]}" in ENDINGS or is_picture(member.name, data[:HEAD]):
            return {"bytes": data, "path": f"{self.shard.path.name}:{member.name}"}
        try:
            return text_of(data)
        except UnicodeDecodeError:
            return data

    def _follow(self, member: Member) -> Member:
        found: Member | None = member
        for _ in range(_MOST_LINKS):
            if found is None or found.kind not in ("link", "symlink"):
                break
            # A symbolic link starts from where it lies, a hard one names a member.
            base = posixpath.dirname(found.name) if found.kind == "symlink" else ""
            found = self._files.get(posixpath.normpath(posixpath.join(base, found.target)))
        if found is None or found.kind in ("link", "symlink"):
            raise InputError(
                f"{self._name(member)}: found a link to {printable(member.target)}, which is no file of the archive, "
                "expected one: write the archive with files in the place of links"
            )
        if found.kind != "file":
            raise InputError(f"{self._name(member)}: found a {found.kind}, expected a file: write the archive anew")
        return found

    @cached_property
    def _files(self) -> dict[str, Member]:
        """All members by their names; only archives with links need them."""
        found = dict[str, Member]()
        try:
            for member in members(self._stream, self.shard.length, []):
                found[posixpath.normpath(member.name)] = member
        except DamagedTarError:
            pass
        return found

    def _name(self, member: Member) -> str:
        return f"{self.shard.name}:{printable(member.name)}"


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's key and the lower-case rest after the base name's first dot.

    >>> split_name("./a.b/photo v2.0.JPG")
    ('a.b/photo v2', '0.jpg')
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _look(path: epath.Path) -> _Shard:
    """Reads an archive's headers."""
    passed, notes, seen, apart = Counter[str](), list[str](), set[str](), set[str]()
    rows, damage, length = 0, None, 0
    try:
        length = path.stat().length
        with path.open("rb") as stream:
            for sample in _samples(stream, length, passed, notes):
                rows, damage = rows + 1, sample.damage
                (apart if sample.key in seen else seen).add(sample.key)
    except OSError as error:
        rows, damage = 1, f"{error.strerror or error}"
    return _Shard(path, length, rows, damage, frozenset(apart), passed, notes)


def _samples(stream: IO[bytes], length: int, passed: Counter[str], notes: list[str]) -> Iterator[_Sample]:
    key, group = "", list[Member]()
    try:
        for member in members(stream, length, notes):
            reason = passed_over(member.name)
            if reason is not None:
                passed[reason] += 1
            if reason is not None or member.kind == "folder":
                continue
            new = split_name(member.name)[0]
            if group and new != key:
                yield _Sample(key, group)
                group = []
            key = new
            group.append(member)
    except DamagedTarError as error:
        yield _Sample(key, group, str(error))
        return
    if group:
        yield _Sample(key, group)


def _picture_among(files: dict[str, Member], archive: _Archive) -> str | None:
    """The ending of a sample's picture: by its name, else by its content; one without further dots first.

    Raises:
        InputError: there are several.
    """
    found = [ending for ending in files if f".{ending}" in ENDINGS]
    if not found:
        shown = [name for name, each in files.items() if is_picture(each.name, archive.read(each, HEAD))]
        found = [name for name in shown if "." not in name] or shown
    if len(found) > 1:
        names = " and ".join(printable(files[ending].name) for ending in found[:2])
        raise InputError(
            f"found {names}, two pictures of one row (names are split at their first dot), expected one: leave one "
            f"out, or say which in `columns`, such as `picture: {found[0]}`"
        )
    return found[0] if found else None
