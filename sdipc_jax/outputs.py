"""A run's output folder: pictures, manifest.jsonl with a line for each, and sheet.png."""

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdipc_jax.errors import InputError
from sdipc_jax.sheets import contact_sheet, save_png

Record = dict[str, Any]

_MANIFEST = "manifest.jsonl"
_LONGEST_STEM = 200


@dataclass(frozen=True)
class Subject:
    """Something that pictures are made of.

    Attributes:
        name: what its files are called after; made unique by the folder.
        record: what the manifest says of it.
        picture: the input picture, if there is one, for the sheet.
    """

    name: str
    record: Record
    picture: np.ndarray | None = None


@dataclass
class OutputFolder:
    """Receives pictures one by one; each is whole under its name before the manifest names it.

    Attributes:
        records: the manifest's lines so far.
    """

    folder: Path
    subjects: list[Subject]
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_last_run(self.folder)
        self._stems = unique_stems(subject.name for subject in self.subjects)
        self._pictures: list[list[np.ndarray]] = [[] for _ in self.subjects]

    def add(self, subject: int, index: int, picture: np.ndarray, record: Record) -> None:
        """Saves picture `index` of a subject, with its record inside and in the manifest."""
        path = self.folder / f"{self._stems[subject]}-{index:03d}.png"
        record = {"file": path.name} | self.subjects[subject].record | {"index": index} | record
        save_png(path, picture, record)
        self.add_record(record)
        self._pictures[subject].append(picture)

    def add_record(self, record: Record) -> None:
        """Appends a line to the manifest; one with `error` stands for an input that could not be used."""
        with (self.folder / _MANIFEST).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records.append(record)

    def finish(self) -> Path:
        """Writes the contact sheet: a row for each subject, its input before its results."""
        rows = [
            ([] if subject.picture is None else [subject.picture]) + pictures
            for subject, pictures in zip(self.subjects, self._pictures, strict=True)
        ]
        path = self.folder / "sheet.png"
        save_png(path, np.asarray(contact_sheet(rows, labels=[subject.name for subject in self.subjects])), {})
        return path


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that cannot be written, or that holds another run.

    Raises:
        InputError: with the reason.
    """
    check_writable(folder)
    if (folder / _MANIFEST).exists() and not overwrite:
        raise InputError(f"{folder} holds the {_MANIFEST} of another run: choose another --output-dir or --overwrite")


def check_writable(folder: Path) -> None:
    """Refuses a folder that is none, or that cannot be made or written. Leaves nothing behind.

    Raises:
        InputError: with the reason.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        # Trying is the only sure test: rights alone do not tell, least of all to an administrator.
        tempfile.TemporaryDirectory(dir=existing, prefix=".sdipc-").cleanup()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write to {existing} ({error.strerror}), expected a folder to write to: choose another"
        ) from None


def unique_stems(names: Iterable[str]) -> list[str]:
    """File name stems for names: safe in any file system, the second of equal ones called `-2`, and so on.

    >>> unique_stems(["cat", "dog", "cat", "cat-2", "a/b"])
    ['cat', 'dog', 'cat-2', 'cat-2-2', 'a_b']
    """
    stems: list[str] = []
    for name in names:
        safe = re.sub(r"[\x00-\x1f\x7f/\\]", "_", name).strip(". ") or "picture"
        safe = safe.encode()[:_LONGEST_STEM].decode(errors="ignore")
        stem, count = safe, 1
        while stem in stems:
            count += 1
            stem = f"{safe}-{count}"
        stems.append(stem)
    return stems


def _remove_last_run(folder: Path) -> None:
    """Takes away what an earlier run's manifest names, so that the folder tells of one run alone."""
    manifest = folder / _MANIFEST
    if not manifest.exists():
        return
    for line in manifest.read_text(encoding="utf-8").splitlines():
        try:
            name = json.loads(line)["file"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(name, str) and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    manifest.unlink()
