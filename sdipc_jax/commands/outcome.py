"""What a command did, for people and as JSON."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from sdipc_jax.errors import printable
from sdipc_jax.records import Counted, Record
from sdipc_jax.settings import CommandSettings, Settings


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        records: one for each picture made.
        failures: one for each input that could not be used, with `input` and `error`.
        files: what was written, the one to look at last.
        notes: what a person should know besides.
    """

    records: list[Record]
    files: list[Path]
    failures: list[Record] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_json(self) -> Record:
        """What `--json` prints: what made the pictures is the same checkpoint, which is told once."""
        told = [record["checkpoint"] for record in self.records if "checkpoint" in record]
        return ({"checkpoint": told[0]} if told else {}) | {
            "records": [{name: record[name] for name in record if name != "checkpoint"} for record in self.records],
            "files": [str(path) for path in self.files],
            "failures": self.failures,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        flagged = sum(record.get("flagged", False) for record in self.records)
        withheld = f", {flagged} of them withheld by the safety checker" if flagged else ""
        summary = f"{len(self.records)} done{withheld}, {len(self.failures)} failed; see {printable(self.files[-1])}"
        return "\n".join([*self.notes, summary])


@dataclass(frozen=True)
class Answer:
    """What a command found out that writes no files.

    Attributes:
        records: one for each thing that was asked about, or found.
        lines: the same for people.
        failures: one for each input that could not be used.
        notes: what a person should know besides.
    """

    records: list[Record]
    lines: list[str]
    failures: list[Record] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_json(self) -> Record:
        """What `--json` prints."""
        return {"records": self.records, "failures": self.failures, "notes": self.notes}

    def __str__(self) -> str:
        return "\n".join([*self.notes, *self.lines])


def notes_of(records: Iterable[Record]) -> list[str]:
    """What is odd about the inputs, a line each, or a line for several."""
    counted = Counted()
    for record in records:
        counted.add(printable(record.get("input", "")), record.get("notes", ()))
    return counted.lines()


def say(settings: CommandSettings, message: str) -> None:
    """Tells a person something while the work goes on, beside the bar."""
    if not (settings.quiet or settings.json_):
        tqdm.write(f"sdipc: {message}", file=sys.stderr)


def plain(settings: Settings, left_out: set[str]) -> Record:
    """Settings as a record has them."""
    return settings.model_dump(mode="json", exclude={"json_", "quiet", "overwrite"} | left_out)
