"""The command `batch`: settings in, shards out. What can be refused is refused before anything is compiled."""

import itertools
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from tqdm import tqdm

from sdipc_jax.batch import cluster
from sdipc_jax.batch.checks import rows_that_will_fail
from sdipc_jax.batch.job import Job
from sdipc_jax.batch.manifest import Manifest
from sdipc_jax.batch.pipeline import SHOWN_FAILURES, Device, Progress
from sdipc_jax.batch.plan import Measured, PlanOutcome, measure, plan_job
from sdipc_jax.batch.planning import duration
from sdipc_jax.batch.sampler import Sampler
from sdipc_jax.batch.settings import BatchSettings, read_job
from sdipc_jax.batch.storage import is_local
from sdipc_jax.commands.outcome import say
from sdipc_jax.errors import printable
from sdipc_jax.interruption import Interruption, locked
from sdipc_jax.records import Record, Report


@dataclass(frozen=True)
class BatchOutcome:
    """What one process did of a job.

    Attributes:
        rows, shards: of the whole job.
        mine: how many shards are this process's.
        skipped: how many of them were finished before.
        progress: of this run.
        failures: a few of the rows that failed, now or before, with `row` and `error`.
        failed: how many have failed in this process's shards.
        missing: shards of this process that are not finished.
        interrupted: whether it was asked to stop before the end.
        seconds: since it began to read.
        manifest: the job's digests, where all shards of all processes are there.
    """

    folder: str
    rows: int
    shards: int
    mine: int
    skipped: int
    progress: Progress
    failures: list[Record]
    failed: int
    seconds: float
    interrupted: bool = False
    stopped: str | None = None
    notes: tuple[str, ...] = ()
    manifest: Record | None = None

    def to_json(self) -> Record:
        """What `--json` prints."""
        return {
            "folder": self.folder,
            "rows": self.rows,
            "shards": self.shards,
            "done": self.progress.done,
            "failed": self.failed,
            "shards_done": self.progress.shards,
            "shards_skipped": self.skipped,
            "batches": self.progress.batches,
            "waiting": self.progress.waiting,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "manifest": self.manifest,
            "failures": self.failures,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        progress = self.progress
        lines = [*self.notes, *([self.stopped] if self.stopped else [])]
        if self.mine == self.skipped:
            lines.append(f"nothing to do: all {self.mine} shards are finished")
        else:
            lines.append(
                f"{progress.done} rows done, {self.failed} failed, {progress.shards} of {self.mine} shards written and "
                f"{self.skipped} found finished, in {duration(self.seconds)}"
            )
        if progress.waiting is not None:
            lines.append(f"the device waited for the host {progress.waiting:.1%} of the time")
        if self.manifest is not None:
            lines.append(f"digest {self.manifest['digest']}, of the pictures {self.manifest['pictures']}")
        elif not self.interrupted and not self.stopped:
            own = progress.shards + self.skipped == self.mine
            lines.append("shards of other processes are not there yet" if own else "shards are missing: start it again")
        if self.interrupted:
            lines.append("interrupted; the finished shards are whole: start it again to go on")
        return "\n".join([*lines, f"see {printable(self.folder)}"])


def batch(
    settings: BatchSettings, report: Report, make_device: Callable[..., Device] = Sampler.make
) -> BatchOutcome | PlanOutcome:
    """Does what is left of a job, or of this process's shards of it; or plans it.

    Args:
        make_device: makes what runs batches, from `Sampler.make`'s arguments.
    """
    job = Job.make(read_job(settings.job))
    return _plan(job, settings, make_device) if settings.plan else _run(job, settings, report, make_device)


def _plan(job: Job, settings: BatchSettings, make_device: Callable[..., Device]) -> PlanOutcome:
    devices = jax.local_device_count()

    def measured() -> Measured:
        started = time.perf_counter()
        device, _ = job.recipe.device(make_device)
        loading = time.perf_counter() - started
        return measure(job.settings, job.source, job.reader, device, devices, loading)

    return plan_job(settings, job.settings, job.rows, devices, measured)


def _run(job: Job, settings: BatchSettings, report: Report, make_device: Callable[..., Device]) -> BatchOutcome:
    index, count = _process(settings)
    told_by = settings.launcher()
    if told_by and count > 1:
        say(settings, f"process {index} of {count}, as {told_by} says: --process-index and --process-count change that")
    job.manifest.claim()
    mine = range(index, job.shards, count)
    work = job.left(mine, verify=settings.verify, retry_failed=settings.retry_failed)
    started = time.perf_counter()
    progress, notes, interrupted = Progress(), (*job.manifest.notes, *work.notes), False
    if work:
        notes += tuple(rows_that_will_fail(job.source, job.survey, job.reader))
        for line in (f"rows: {job.rows}, shards: {job.shards}", *notes):
            _tell(settings, line)
        where = cluster.on_ray if settings.on == "ray" else cluster.here
        total = job.rows_of(work)
        with (
            where(job, settings, make_device, partial(_tell, settings)) as run,
            # Inside, for Ray has a handler of its own.
            Interruption() as interruption,
            _alone(job.manifest, index, count) as note,
        ):
            progress = run(
                work,
                lambda progress: interruption.requested or _too_many(progress, settings),
                lambda done: report(min(1.0, done / total)),
            )
            interrupted = interruption.requested
        notes += (*run.notes, *((note,) if note else ()))
    left = [header for header in work.finished if header.failed]
    before = itertools.chain.from_iterable(job.failures(header.shard) for header in left)
    return BatchOutcome(
        folder=job.settings.output_dir,
        rows=job.rows,
        shards=job.shards,
        mine=len(mine),
        skipped=len(work.finished),
        progress=progress,
        failures=list(itertools.islice(itertools.chain(progress.failures, before), SHOWN_FAILURES)),
        failed=progress.failed + sum(header.failed for header in left),
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
        stopped=_stopped(progress, settings),
        notes=(*notes, *progress.odd.lines()),
        manifest=job.manifest.sum_up(job.shards),
    )


def _process(settings: BatchSettings) -> tuple[int, int]:
    index, count = settings.process()
    if count == 1 and settings.process_count is None and jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return index, count


def _alone(manifest: Manifest, index: int, count: int) -> AbstractContextManager[str | None]:
    """Refuses to do the same part of the job twice at once, where the folder is on a file system."""
    if not is_local(manifest.folder):
        return nullcontext()
    return locked(Path(manifest.folder, ".processes", f"{index}-of-{count}"))


def _tell(settings: BatchSettings, line: str) -> None:
    if not settings.quiet:
        tqdm.write(f"sdipc: {line}", file=sys.stderr)


def _too_many(progress: Progress, settings: BatchSettings) -> bool:
    return settings.max_failures is not None and progress.failed > settings.max_failures


def _stopped(progress: Progress, settings: BatchSettings) -> str | None:
    if not _too_many(progress, settings):
        return None
    return (
        f"stopped: {progress.failed} rows have failed, more than --max-failures {settings.max_failures}; the finished "
        "shards are whole"
    )
