"""Records: what a run says of its work, as JSON has it, and how much of it is done."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
# Called with how much is done, from 0 to 1.
Report = Callable[[float], None]
_SHOWN = 8


@dataclass
class Counted:
    """Notes about many things, each told once, with how many have it and one of them.

    >>> counted = Counted()
    >>> for name in ("a.png", "b.png"):
    ...     counted.add(name, ["transparent"])
    >>> counted.lines()
    ['transparent: 2 pictures, the first is a.png']
    """

    found: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, name: str, notes: Iterable[str]) -> None:
        """Counts the notes of one."""
        for note in notes:
            self.found.setdefault(note, [name, 0])[1] += 1

    def merge(self, other: "Counted") -> None:
        """Counts what another one has counted as well."""
        for note, (name, count) in other.found.items():
            self.found.setdefault(note, [name, 0])[1] += count

    def lines(self) -> list[str]:
        """The notes, the most frequent first, and no more of them than a screen has room for."""
        ordered = sorted(self.found.items(), key=lambda each: (-each[1][1], each[0]))
        lines = [
            f"{note}: {count} pictures, the first is {name}" if count > 1 else f"{name}: {note}"
            for note, (name, count) in ordered[:_SHOWN]
        ]
        more = len(ordered) - _SHOWN
        return lines + ([f"and {more} more kinds of notes"] if more > 0 else [])


def digest_of(content: Any) -> str:
    """The sha256 of anything that JSON can hold, of bytes by their own digest."""

    def encode(value: Any) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)

    return hashlib.sha256(json.dumps(content, sort_keys=True, default=encode).encode()).hexdigest()


def name_row(row: int, place: str) -> str:
    """A row for a person: its number in the job, and where it stands in the data set.

    >>> name_row(2, "rows.jsonl, line 3"), name_row(2, "")
    ('row 2 (rows.jsonl, line 3)', 'row 2')
    """
    return f"row {row} ({place})" if place else f"row {row}"
