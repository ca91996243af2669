"""What is done: a manifest for each shard, which also says that it is, and one for the whole job.

`shard-00000.jsonl` has a header and a line for each row. It is written after the shard's results: where it is, they
are. `job.json` says which job the folder holds, `manifest.json` sums up when all shards are there.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from etils import epath

from sdipc_jax.batch import storage
from sdipc_jax.batch.shards import Files, shard_name
from sdipc_jax.errors import InputError, printable
from sdipc_jax.records import Record, digest_of

_JOB, _MANIFEST = "job.json", "manifest.json"
_SHOWN = 200


@dataclass(frozen=True)
class Header:
    """A shard in brief.

    Attributes:
        job: digest of the job that it belongs to.
        rows, done, failed: how many.
        digest: of the rows' ids and whether they are done.
        pictures: of their ids and results' digests.
        lines: of the manifest's lines.
        files: what the shard consists of.
    """

    shard: int
    job: str
    rows: int
    done: int
    failed: int
    digest: str
    pictures: str
    lines: str
    files: Files


@dataclass(frozen=True)
class Manifest:
    """The folder's record of a job.

    Attributes:
        folder: where results go.
        job: what the job is, as job.json has it.
        notes: what the survey of the data set told. It is written down, but does not make another job.
    """

    folder: epath.Path
    job: Record
    notes: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Names the job."""
        return digest_of(self.job)

    def claim(self) -> None:
        """Makes the folder this job's.

        Raises:
            InputError: it holds another job, with what differs, or cannot be written.
        """
        path = self.folder / _JOB
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                # It may be another host's, made a moment ago.
                if self.folder.is_file() or not storage.appears(self.folder):
                    raise
            if not path.exists():
                _write_once(path, (json.dumps(self.job | {"notes": self.notes}, indent=2) + "\n").encode())
        except OSError as error:
            raise _unusable(path, error) from None
        self.check()

    def check(self) -> None:
        """Refuses a folder that is not this job's.

        Raises:
            InputError: it holds no job or another one, with what differs.
        """
        path = self.folder / _JOB
        try:
            found = json.loads(path.read_text())
            found.pop("notes", None)
        except OSError as error:
            raise _unusable(path, error) from None
        except (ValueError, AttributeError, TypeError):
            raise InputError(
                f"{printable(path)}: found no JSON object, expected a job's record: choose another output_dir"
            ) from None
        differences = list(_differences(found, json.loads(json.dumps(self.job))))
        if differences:
            raise InputError(
                f"{printable(self.folder)} holds another job: {'; '.join(differences)}: choose another output_dir, or "
                "change the settings back"
            )

    def path(self, shard: int) -> epath.Path:
        """Where the manifest of a shard is."""
        return self.folder / f"{shard_name(shard)}.jsonl"

    def enter(self, shard: int, records: Iterable[Record], files: Files) -> Header:
        """Says that a shard is done.

        Args:
            records: one for each row, in order.

        Raises:
            OSError: it cannot be written.
        """
        records = list(records)
        lines = [json.dumps(record) + "\n" for record in records]
        done = [record for record in records if record["status"] == "done"]
        header = Header(
            shard=shard,
            job=self.digest,
            rows=len(records),
            done=len(done),
            failed=len(records) - len(done),
            digest=_sha256(f"{record['id']} {record['status']}\n" for record in records),
            pictures=_sha256(f"{record['id']} {record['sha256']}\n" for record in done),
            lines=_sha256(lines),
            files=files,
        )
        storage.write(self.path(shard), (json.dumps(asdict(header)) + "\n" + "".join(lines)).encode())
        return header

    def header(self, shard: int) -> Header | None:
        """A shard's header; None if it is not done, or its manifest is damaged or another job's."""
        try:
            with self.path(shard).open("rb") as stream:
                found = Header(**json.loads(stream.readline()))
        except (OSError, ValueError, TypeError):
            return None
        return found if (found.shard, found.job) == (shard, self.digest) else None

    def records(self, shard: int) -> list[Record]:
        """The lines of a shard's manifest."""
        return [json.loads(line) for line in self.path(shard).read_text().splitlines()[1:]]

    def problem(self, header: Header, *, thorough: bool) -> str | None:
        """What is wrong with a finished shard's files, if anything.

        Args:
            thorough: read them all; otherwise sizes are compared.
        """
        if thorough:
            with self.path(header.shard).open("rb") as stream:
                stream.readline()
                if hashlib.sha256(stream.read()).hexdigest() != header.lines:
                    return f"{self.path(header.shard).name} is damaged"
        for name, (length, sha256) in header.files.items():
            path = self.folder / name
            try:
                found = path.stat().length
            except OSError:
                return f"{name} is missing"
            if found != length:
                return f"{name} has {found} bytes for {length}"
            if thorough and storage.digest(path) != sha256:
                return f"{name} is damaged"
        return None

    def sum_up(self, shards: int) -> Record | None:
        """Writes manifest.json, whose digests do not depend on who did what; None if shards are missing."""
        present = {path.name for path in self.folder.iterdir()}
        # A listing may be older than what other hosts have just finished; a name that was never asked for is not.
        if any(self.path(shard).name not in present and not self.path(shard).exists() for shard in range(shards)):
            return None
        storage.remove_leftovers(self.folder, "")
        headers = [header for shard in range(shards) if (header := self.header(shard)) is not None]
        if len(headers) < shards:
            return None
        summary: dict[str, Any] = {
            "rows": sum(header.rows for header in headers),
            "done": sum(header.done for header in headers),
            "failed": sum(header.failed for header in headers),
            "shards": shards,
            "digest": _sha256([self.digest, *(header.digest for header in headers)]),
            "pictures": _sha256(header.pictures for header in headers),
        }
        written = summary | {"notes": self.notes, "job": self.job}
        storage.write(self.folder / _MANIFEST, (json.dumps(written, indent=2) + "\n").encode())
        return summary


def _unusable(path: epath.Path, error: OSError) -> InputError:
    return InputError(
        f"{printable(path)}: {error.strerror or error}, expected a folder to write to that all who share the job see: "
        "choose another output_dir"
    )


def _write_once(path: epath.Path, data: bytes) -> None:
    """Writes a file unless another process has just done so."""
    if not storage.is_local(path):
        return storage.write(path, data)
    temporary = epath.Path(Path(path).with_name(storage.temporary_name(path.name)))
    storage.write(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        storage.appears(path)
    except OSError:  # Not every file system has links.
        storage.rename(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return None


def _differences(found: Record, expected: Record, prefix: str = "") -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        there, here = found.get(name), expected.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"{prefix}{name} is {json.dumps(there)[:_SHOWN]} there and {json.dumps(here)[:_SHOWN]} here"


def _sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()
