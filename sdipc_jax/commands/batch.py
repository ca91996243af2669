"""The command `batch`: settings in, shards out. What can be refused is refused before anything is compiled."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import jax
from etils import epath
from tqdm import tqdm

from sdipc_jax.batch.checks import check_apart, check_columns, rows_that_will_fail
from sdipc_jax.batch.items import Reader
from sdipc_jax.batch.manifest import Header, Manifest
from sdipc_jax.batch.pipeline import SHOWN_FAILURES, Device, Progress, Run
from sdipc_jax.batch.plan import Measured, PlanOutcome, measure, plan_job
from sdipc_jax.batch.planning import duration
from sdipc_jax.batch.sampler import Sampler
from sdipc_jax.batch.settings import BatchSettings, JobSettings, read_job
from sdipc_jax.batch.storage import is_local
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.commands.outcome import say
from sdipc_jax.datasets.rows import Source, Survey
from sdipc_jax.datasets.sources import open_source
from sdipc_jax.errors import InputError, printable
from sdipc_jax.interruption import Interruption, locked
from sdipc_jax.parallel import make_mesh
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.plan import check_one_vector, plan_conversion
from sdipc_jax.prompts.tokens import read_texts
from sdipc_jax.records import Record, Report, digest_of
from sdipc_jax.sampling.advice import advice
from sdipc_jax.sampling.request import decide
from sdipc_jax.settings import Defaults

# What decides every row's result; what a row may say itself is part of the row's key.
_DECISIVE = (
    "dtype",
    "lora_scale",
    "cutoff",
    "keep_fraction",
    "scale",
    "mode",
    "truncate",
    "long_text",
    "prompt_weights",
    "clip_skip",
)
_SAMPLING = ("steps", "guidance_scale", "guidance_interval", "cache_interval", "sampler", "eta", "karras")
_ROWS = ("text", "alpha", "negative_prompt", "seed", "height", "width", "sizes")
_RESULTS = ("vectors", "container", "format", "quality", "shard_size")


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
            lines.append("shards of other processes are missing")
        if self.interrupted:
            lines.append("interrupted; the finished shards are whole: start it again to go on")
        return "\n".join([*lines, f"see {printable(self.folder)}"])


@dataclass(frozen=True)
class _Job:
    """A job, checked against its checkpoint and its data set."""

    settings: JobSettings
    config: Config
    values: Defaults
    source: Source
    survey: Survey
    manifest: Manifest
    reader: Reader

    @classmethod
    def make(cls, settings: JobSettings) -> "_Job":
        config = configure(settings)
        if settings.vectors:
            check_one_vector(settings)
        plan = plan_conversion(config, settings)
        values = decide(config, settings)
        for height, width in ((values.height, values.width), *settings.sizes):
            config.latent_shape(height, width)
        texts = [each for each in (settings.text, settings.negative_prompt) if each is not None]
        read_texts(config, texts, **settings.wording)
        columns = settings.columns
        source = open_source(settings.source, None if columns is None else columns.values())
        check_apart(source, settings.output_dir)
        survey = source.survey()
        if survey.rows == 0:
            told = "".join(f"; {note}" for note in survey.notes)
            raise InputError(
                f"source is {settings.source!r}, but there are no pictures{told}, expected one: check the path"
            )
        check_columns(source, settings)
        typed = settings.model_dump(mode="json") | values.model_dump(mode="json", exclude_none=True)
        typed["negative_prompt"] = config.negative_text(settings.negative_prompt)
        # A scale that is measured follows from the checkpoint.
        names = _DECISIVE if settings.vectors else (*_DECISIVE, *_SAMPLING)
        decisive: Record = {name: typed[name] for name in names} | plan.record()
        decisive["checkpoint"] = digests(config, settings.tuned)
        if settings.fit != "crop":
            decisive["fit"] = settings.fit
        record = decisive | {name: typed[name] for name in (*_ROWS, *_RESULTS)}
        # How many rows a damaged file had is not known.
        rows = {"damaged": survey.damaged} if survey.damaged else {"rows": survey.rows}
        record["source"] = {"sha256": survey.sha256, **rows, "columns": columns}
        manifest = Manifest(epath.Path(settings.output_dir), record, (*survey.damaged, *survey.notes))
        reader = Reader(config, settings, values, digest_of(decisive))
        return cls(settings, config, values, source, survey, manifest, reader)

    @property
    def rows(self) -> int:
        return self.survey.rows

    @property
    def shards(self) -> int:
        return -(-self.rows // self.settings.shard_size)


@dataclass
class _Work:
    """What is left to do of a process's shards."""

    whole: set[int] = field(default_factory=set)
    partly: dict[int, set[int]] = field(default_factory=dict)
    """Shards in which some rows have failed, with the numbers of those rows."""
    finished: list[Header] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def wants(self, row: int, shard_size: int) -> bool:
        shard = row // shard_size
        return shard in self.whole or row in self.partly.get(shard, ())


def batch(
    settings: BatchSettings, report: Report, make_device: Callable[..., Device] = Sampler.make
) -> BatchOutcome | PlanOutcome:
    """Does what is left of a job, or of this process's shards of it; or plans it.

    Args:
        make_device: makes what runs batches, from `Sampler.make`'s arguments.
    """
    job = _Job.make(read_job(settings.job))
    return _plan(job, settings, make_device) if settings.plan else _run(job, settings, report, make_device)


def _plan(job: _Job, settings: BatchSettings, make_device: Callable[..., Device]) -> PlanOutcome:
    devices = jax.local_device_count()

    def measured() -> Measured:
        started = time.perf_counter()
        device, _ = _device(job, make_device)
        loading = time.perf_counter() - started
        return measure(job.settings, job.source, job.reader, device, devices, loading)

    return plan_job(settings, job.settings, job.rows, devices, measured)


def _device(job: _Job, make_device: Callable[..., Device]) -> tuple[Device, tuple[str, ...]]:
    """What runs batches on this process's devices, and what a person should know about it."""
    converter = Converter(job.config, job.settings)
    mesh = make_mesh(None, jax.local_devices())
    notes = (*job.config.notes, *advice(job.config, job.settings, job.values), *converter.notes)
    return make_device(converter.bundle, converter.projection, job.settings, job.values, mesh), notes


def _run(job: _Job, settings: BatchSettings, report: Report, make_device: Callable[..., Device]) -> BatchOutcome:
    index, count = _process(settings)
    told_by = settings.launcher()
    if told_by and count > 1:
        say(settings, f"process {index} of {count}, as {told_by} says: --process-index and --process-count change that")
    job.manifest.claim()
    mine = range(index, job.shards, count)
    work = _left(job.manifest, mine, settings)
    started = time.perf_counter()
    progress, notes, interrupted = Progress(), (*job.manifest.notes, *work.notes), False
    if work.whole or work.partly:
        notes += tuple(rows_that_will_fail(job.source, job.survey, job.reader))
        if not settings.quiet:
            for line in (f"rows: {job.rows}, shards: {job.shards}", *notes):
                tqdm.write(f"sdipc: {line}", file=sys.stderr)
        device, told = _device(job, make_device)
        notes += told
        total = _rows_of(work, job)
        with Interruption() as interruption, _alone(job.manifest, index, count) as note:
            notes += (note,) if note else ()
            run = Run(
                job=job.settings,
                manifest=job.manifest,
                device=device,
                batch_size=job.settings.batch_size * jax.local_device_count(),
                kept=lambda shard: _kept(job.manifest, work, shard),
                stopping=lambda progress: interruption.requested or _too_many(progress, settings),
                report=lambda done: report(min(1.0, done / total)),
            )
            wanted = job.source.rows(lambda row: work.wants(row, job.settings.shard_size))
            progress = run(wanted, job.reader)
            interrupted = interruption.requested
    left = [header for header in work.finished if header.failed]
    before = itertools.chain.from_iterable(_failures(job.manifest, header.shard) for header in left)
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


def _left(manifest: Manifest, mine: range, settings: BatchSettings) -> _Work:
    """Looks at every shard of this process."""
    work = _Work()
    for shard in mine:
        header = manifest.header(shard)
        if header is None:
            if manifest.path(shard).exists():
                work.notes.append(f"{manifest.path(shard).name} is damaged: the shard is done again")
            work.whole.add(shard)
        elif problem := manifest.problem(header, thorough=settings.verify):
            work.notes.append(f"{problem}: the shard is done again")
            work.whole.add(shard)
        elif header.failed and settings.retry_failed:
            work.partly[shard] = {record["row"] for record in _failures(manifest, shard)}
        else:
            work.finished.append(header)
    return work


def _kept(manifest: Manifest, work: _Work, shard: int) -> list[Record]:
    """The results that stay in a shard, others of which are tried again."""
    if shard not in work.partly:
        return []
    return [record for record in manifest.records(shard) if record["status"] == "done"]


def _alone(manifest: Manifest, index: int, count: int) -> AbstractContextManager[str | None]:
    """Refuses to do the same part of the job twice at once, where the folder is on a file system."""
    if not is_local(manifest.folder):
        return nullcontext()
    return locked(Path(manifest.folder, ".processes", f"{index}-of-{count}"))


def _rows_of(work: _Work, job: _Job) -> int:
    size = job.settings.shard_size
    whole = sum(min(size, job.rows - shard * size) for shard in work.whole)
    return whole + sum(map(len, work.partly.values()))


def _failures(manifest: Manifest, shard: int) -> Iterator[Record]:
    return (record for record in manifest.records(shard) if record["status"] == "failed")


def _too_many(progress: Progress, settings: BatchSettings) -> bool:
    return settings.max_failures is not None and progress.failed > settings.max_failures


def _stopped(progress: Progress, settings: BatchSettings) -> str | None:
    if not _too_many(progress, settings):
        return None
    return (
        f"stopped: {progress.failed} rows have failed, more than --max-failures {settings.max_failures}; the finished "
        "shards are whole"
    )
