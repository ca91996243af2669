"""A run's output folder: pictures, manifest.jsonl with a line for each, and sheet.png."""

import contextlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import check_result
from sdipc_jax.pictures.sheets import contact_sheet, save_png, thumbnail
from sdipc_jax.records import Record
from sdipc_jax.settings import MANIFEST

_SHEET = "sheet.png"
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
        self._stems = _stems(self.subjects)
        self._pictures: list[list[np.ndarray]] = [[] for _ in self.subjects]

    def add(self, subject: int, index: int, picture: np.ndarray, record: Record) -> None:
        """Saves picture `index` of a subject, with its record inside and in the manifest."""
        path = self.folder / _file_name(self._stems[subject], index)
        record = {"file": path.name} | self.subjects[subject].record | {"index": index} | record
        save_png(path, picture, record)
        self.add_record(record)
        self._pictures[subject].append(thumbnail(picture))

    def add_record(self, record: Record) -> None:
        """Appends a line to the manifest; one with `error` stands for an input that could not be used."""
        try:
            with (self.folder / MANIFEST).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(
                f"{printable(self.folder / MANIFEST)}: {error.strerror}, expected a file to write to: free some space "
                "or choose another --output-dir"
            ) from error
        self.records.append(record)

    def finish(self) -> Path:
        """Writes the contact sheet: a row for each subject, its input before its results."""
        rows = [
            ([] if subject.picture is None else [subject.picture]) + pictures
            for subject, pictures in zip(self.subjects, self._pictures, strict=True)
        ]
        path = self.folder / _SHEET
        save_png(path, np.asarray(contact_sheet(rows, labels=[subject.name for subject in self.subjects])), {})
        return path


def check_output(folder: Path, subjects: Sequence[Subject], num_images: int, overwrite: bool) -> None:
    """Refuses a folder that cannot be written, that holds another run, or where a file would be lost.

    Raises:
        InputError: with the reason.
    """
    check_result(folder / MANIFEST, "--output-dir", overwrite)
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    wanted = {_file_name(stem, index) for stem in _stems(subjects) for index in range(num_images)} | {_SHEET}
    if overwrite:
        lost = present & (wanted | _last_run(folder))
        records = [record for subject in subjects for record in (subject.record, *subject.record.get("inputs", ()))]
        for path in (Path(record.get("input", "")) for record in records):
            if path.name in lost and path.samefile(folder / path.name):
                raise InputError(
                    f"{printable(path)}: found an input among the files to be replaced: choose another --output-dir"
                )
    elif wanted & present:
        raise InputError(
            f"{printable(folder / min(wanted & present))} is there already: choose another --output-dir or --overwrite"
        )


def unique_stems(names: Iterable[str]) -> list[str]:
    """File name stems for names: safe in any file system, the second of equal ones called `-2`, and so on.

    >>> unique_stems(["cat", "dog", "cat", "cat-2", "a/b"])
    ['cat', 'dog', 'cat-2', 'cat-2-2', 'a_b']
    """
    stems: list[str] = []
    taken: set[str] = set()
    counts: dict[str, int] = {}
    for name in names:
        safe = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", name).strip(". ")
        # Names from a disk need not be valid Unicode.
        safe = os.fsencode(safe)[:_LONGEST_STEM].decode(errors="ignore") or "picture"
        stem = safe
        # Some file systems take upper and lower case, or two ways to write an accent, for the same.
        while (same := unicodedata.normalize("NFC", stem).casefold()) in taken:
            counts[safe] = counts.get(safe, 1) + 1
            stem = f"{safe}-{counts[safe]}"
        taken.add(same)
        stems.append(stem)
    return stems


def _stems(subjects: Iterable[Subject]) -> list[str]:
    return unique_stems(subject.name for subject in subjects)


def _file_name(stem: str, index: int) -> str:
    return f"{stem}-{index:03d}.png"


def _last_run(folder: Path) -> set[str]:
    """The names of the files in a folder that an earlier run made there."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return set()
    names = {MANIFEST, _SHEET}
    for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            name = json.loads(line)["file"]
            # A manifest may come from anywhere, and must not name files elsewhere.
            if Path(name).name == name and name.endswith(".png"):
                names.add(name)
    return names


def _remove_last_run(folder: Path) -> None:
    """Takes an earlier run away, so that the folder tells of one run alone; its manifest last."""
    for name in sorted(_last_run(folder), key=MANIFEST.__eq__):
        (folder / name).unlink(missing_ok=True)
