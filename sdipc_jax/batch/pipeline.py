"""Reading, decoding, sampling, encoding and writing at once, each in its own threads, with queues that are short.

rows and batches (a thread, with readers)  ->  device (main thread)  ->  shards (a thread, with encoders)
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Protocol

import numpy as np

from sdipc_jax.batch.items import Ids, Item, with_index
from sdipc_jax.batch.manifest import Manifest
from sdipc_jax.batch.sampler import Batch
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.batch.shards import Shard, container, encode, file_name
from sdipc_jax.batch.threads import Ahead, Behind, map_ahead
from sdipc_jax.datasets.rows import RawRow
from sdipc_jax.errors import InputError, printable, shortened
from sdipc_jax.parallel import Watchdog
from sdipc_jax.records import Counted, Record

_BATCHES_AHEAD = 2
_RESULTS_BEHIND = 4
SHOWN_FAILURES = 10


# A batch, its pictures or vectors, and which of them the safety checker flagged.
Results = tuple[Batch, np.ndarray, np.ndarray]


class Device(Protocol):
    """What runs batches: a `Sampler`."""

    def vectors(self, items: Sequence[Item]) -> np.ndarray: ...

    def pictures(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class End:
    """All rows of a shard have been read, and its last batch is on its way.

    Attributes:
        failed: the records of rows that cannot be used.
    """

    shard: int
    failed: list[Record]


@dataclass
class Progress:
    """What has happened in this run.

    Attributes:
        failures: the first ten.
        odd: notes about pictures that were read.
        busy: seconds in which the device worked, those that compiled left out.
        seconds: that busy is a share of.
    """

    done: int = 0
    failed: int = 0
    failures: list[Record] = field(default_factory=list)
    odd: Counted = field(default_factory=Counted)
    shards: int = 0
    batches: int = 0
    busy: float = 0.0
    seconds: float = 0.0

    @property
    def waiting(self) -> float | None:
        """The share of the time in which the device waited for the host; None where too little ran to tell."""
        return 1 - self.busy / self.seconds if self.busy else None

    def fail(self, record: Record) -> None:
        self.failed += 1
        if len(self.failures) < SHOWN_FAILURES:
            self.failures.append(record)

    def add(self, other: "Progress") -> None:
        """Counts what another one has done as well."""
        for name in ("done", "failed", "shards", "batches", "busy", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures += other.failures[: max(0, SHOWN_FAILURES - len(self.failures))]
        self.odd.merge(other.odd)


@dataclass(frozen=True)
class Run:
    """One run over some of a job's shards.

    Attributes:
        kept: records of results that stay in a shard whose other rows are done again.
        finished: whether another process, believed dead perhaps, has finished a shard meanwhile.
        stopping: asked between batches whether to stop.
        report: called with the number of rows that are done or failed.
    """

    job: JobSettings
    manifest: Manifest
    device: Device
    batch_size: int
    kept: Callable[[int], list[Record]]
    finished: Callable[[int], bool]
    stopping: Callable[[Progress], bool]
    report: Callable[[int], None]
    progress: Progress = field(default_factory=Progress)

    def __call__(self, rows: Iterable[RawRow], reader: Callable[[RawRow], Item]) -> Progress:
        """Does what the rows ask for, all rows of a shard one after the other; gives what has happened.

        A shard that is not finished when the run stops leaves nothing.
        """
        threads = max(4, 2 * (os.cpu_count() or 1))
        with ThreadPoolExecutor(threads, "reader") as readers, ThreadPoolExecutor(threads, "encoder") as encoders:
            items = map_ahead(readers, reader, rows, ahead=_BATCHES_AHEAD * self.batch_size + threads)
            writer = _Writer(self.job, self.manifest, self.kept, self.finished, self.progress, encoders)
            ahead = Ahead(self._batches(items), _BATCHES_AHEAD, lambda: self.stopping(self.progress))
            with ahead as events, Behind(writer, _RESULTS_BEHIND) as behind:
                self._work(events, behind)
        return self.progress

    def _batches(self, items: Iterable[Item]) -> Iterator[Batch | End]:
        """Batches hold rows of one shard, in order, so that they are the same whoever does the shard."""
        for shard, group in itertools.groupby(items, key=lambda item: item.row // self.job.shard_size):
            if self.stopping(self.progress):
                return
            ids = Ids({record["id"] for record in self.kept(shard)})
            pending: dict[tuple[Any, ...], list[tuple[Item, str]]] = {}
            failed = []
            for item in group:
                item_id = ids.give(item.key)
                if item.error is not None:
                    failed.append(failure(item.row, item_id, item.record, item.error, item.place))
                    self.progress.fail(failed[-1])
                    continue
                batch = pending.setdefault(item.program, [])
                batch.append((item, item_id))
                if len(batch) == self.batch_size:
                    yield Batch(item.size, *zip(*pending.pop(item.program), strict=True))
            for batch in pending.values():
                yield Batch(batch[0][0].size, *zip(*batch, strict=True))
            yield End(shard, failed)

    def _work(self, events: Iterator[Batch | End], behind: Behind[Results | End]) -> None:
        compiled: set[tuple[Any, ...]] = set()
        started: float | None = None
        compiling = 0.0
        with Watchdog() as watchdog:
            for event in events:
                if isinstance(event, End):
                    behind.put(event)
                elif self.stopping(self.progress):
                    return
                else:
                    begun = time.perf_counter()
                    if event.items[0].program in compiled:
                        with watchdog.step():
                            results = run_batch(self.job, self.device, event)
                        self.progress.busy += time.perf_counter() - begun
                    else:
                        results = run_batch(self.job, self.device, event)
                        compiled.add(event.items[0].program)
                        compiling += time.perf_counter() - begun
                    self.progress.batches += 1
                    if started is None:
                        started, compiling = time.perf_counter(), 0.0
                    self.progress.seconds = time.perf_counter() - started - compiling
                    behind.put(results)
                    self.report(self.progress.done + self.progress.failed)


def run_batch(job: JobSettings, device: Device, batch: Batch) -> Results:
    """A batch's pictures or vectors, as the job asks for."""
    if job.vectors:
        return batch, device.vectors(batch.items), np.zeros(len(batch.items), bool)
    return batch, *device.pictures(batch)


class _Writer:
    """Encodes results and writes them, a shard after the other; called in one thread."""

    def __init__(
        self,
        job: JobSettings,
        manifest: Manifest,
        kept: Callable[[int], list[Record]],
        finished: Callable[[int], bool],
        progress: Progress,
        encoders: ThreadPoolExecutor,
    ) -> None:
        self.job, self.manifest, self.kept, self.finished = job, manifest, kept, finished
        self.progress, self.encoders = progress, encoders
        self.sampling = manifest.job
        self.shard: Shard | None = None
        self.records: list[Record] = []
        self.places: dict[int, str] = {}

    def __call__(self, event: Results | End) -> None:
        if isinstance(event, End):
            self._finish(event)
            return
        batch, results, flagged = event
        shard = self._open(batch.items[0].row // self.job.shard_size)
        told = list(map(with_index, batch.items, batch.ids))
        files = self.encoders.map(partial(encode, job=self.job, sampling=self.sampling), results, told)
        rows = zip(batch.items, batch.ids, told, files, flagged, strict=True)
        for item, item_id, record, data, is_flagged in rows:
            self.places[item.row] = item.place
            self._add(shard, _success(item.row, item_id, record, data, self.job, bool(is_flagged)), data)

    def close(self) -> None:
        """Leaves nothing of a shard that is not finished."""
        if self.shard is not None:
            self.shard.close()
            self.shard = None

    def _open(self, number: int) -> Shard:
        if self.shard is None:
            self.records, self.places = [], {}
            self.shard = shard = container(self.job)(self.manifest.folder, number)
            if kept := self.kept(number):
                for record, data in shard.read(self.manifest.folder, number, kept):
                    shard.add(record, data)
                    self.records.append(record)
        return self.shard

    def _add(self, shard: Shard, record: Record, data: bytes) -> None:
        try:
            shard.add(record, data)
        except (OSError, InputError) as error:
            record = self._failure(record, f"cannot be written: {_reason(error)}")
            self.progress.fail(record)
        else:
            self.progress.done += 1
            self.progress.odd.add(printable(record["inputs"][0]), record.get("notes", ()))
        self.records.append(record)

    def _failure(self, record: Record, reason: str) -> Record:
        return failure(record["row"], record["id"], record, reason, self.places.get(record["row"], ""))

    def _finish(self, end: End) -> None:
        shard = self._open(end.shard)
        records = sorted([*self.records, *end.failed], key=lambda record: record["row"])
        if self.finished(end.shard):
            # What is there and what is said of it belong together: they stay.
            self.close()
            self.progress.shards += 1
            return
        try:
            files = shard.finish()
        except (OSError, InputError) as error:
            kept = {record["id"] for record in self.kept(end.shard)}
            reason, files = f"cannot be written: {_reason(error)}", {}
            lost = [record for record in records if record["status"] == "done" and record["id"] not in kept]
            self.progress.done -= len(lost)
            failed = {each["id"]: self._failure(each, reason) for each in lost}
            for each in failed.values():
                self.progress.fail(each)
            if kept:
                # What was there before still is, and its manifest is right.
                return
            # The results are lost, but not the rows: --retry-failed does them again.
            records = [failed.get(record["id"], record) for record in records]
        finally:
            self.close()
        try:
            self.manifest.enter(end.shard, records, files)
        except OSError as error:
            raise InputError(
                f"{printable(os.fspath(self.manifest.path(end.shard)))}: {_reason(error)}, expected a folder to write "
                "to: see to the storage and start the job again"
            ) from error
        self.progress.shards += 1


def failure(row: int, item_id: str, record: Record, reason: str, place: str) -> Record:
    """The line of a row that failed: with where it stands in the data set, if that is known, and why."""
    left_out = ("row", "id", "status", "place", "file", "sha256", "flagged", "error")
    rest = {name: value for name, value in record.items() if name not in left_out}
    where = {"place": place} if place else {}
    return {"row": row, "id": item_id, "status": "failed"} | where | {"error": shortened(reason)} | rest


def _success(row: int, item_id: str, told: Record, data: bytes, job: JobSettings, flagged: bool) -> Record:
    record = {"row": row, "id": item_id, "status": "done", "file": file_name(row, job)}
    record |= {"sha256": sha256(data).hexdigest()} | told
    return record | ({"flagged": True} if flagged else {})


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
