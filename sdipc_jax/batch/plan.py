"""What a job will take: `sdipc batch JOB.yaml --plan`, from numbers that are given or measured here."""

import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdipc_jax.batch.items import Reader
from sdipc_jax.batch.pipeline import Device, run_batch
from sdipc_jax.batch.planning import Plan, Stage, plan
from sdipc_jax.batch.sampler import Batch
from sdipc_jax.batch.settings import BatchSettings, JobSettings
from sdipc_jax.batch.shards import encode
from sdipc_jax.datasets.rows import Source, Wanted
from sdipc_jax.errors import InputError
from sdipc_jax.records import Record

# As long as an id, which what is not written has none of.
_ID = "0" * 64


@dataclass(frozen=True)
class Measured:
    """What one picture takes on this machine.

    Attributes:
        read: seconds of one core: reading, decoding, preparing.
        sample: seconds of one device, compilation left out.
        encode: seconds of one core.
        bytes: stored, with its records.
        start: seconds before the first picture, of the whole job: loading, and compiling for each of its sizes.
    """

    read: float
    sample: float
    encode: float
    bytes: float
    start: float


@dataclass(frozen=True)
class PlanOutcome:
    """What `--plan` tells."""

    plan: Plan
    measured: Measured | None

    def to_json(self) -> Record:
        """What `--json` prints."""
        measured = None if self.measured is None else vars(self.measured)
        return self.plan.to_json() | {"measured": measured}

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.plan}\nloading and compiling are not counted: leave out --seconds or --bytes to measure them"
        found = self.measured
        return (
            f"measured here, a picture: {found.read:.3g} s to read, {found.sample:.3g} s to sample, "
            f"{found.encode:.3g} s to encode, {found.bytes:.0f} bytes; {found.start:.3g} s to load and "
            f"compile\n{self.plan}"
        )


def plan_job(
    settings: BatchSettings, job: JobSettings, rows: int, devices: int, measure: Callable[[], Measured]
) -> PlanOutcome:
    """The plan of a job.

    Args:
        rows: of the job, where no other number is asked for.
        devices: of this machine, where no number of chips is given.
        measure: called where seconds or bytes are not given.
    """
    known = settings.seconds is not None and settings.bytes is not None
    measured = None if known else measure()
    chips, hosts = settings.chips or devices, settings.hosts or 1
    seconds, stored = settings.seconds, settings.bytes
    stages = []
    if measured is not None:
        seconds = measured.sample if seconds is None else seconds
        stored = measured.bytes if stored is None else stored
        cores = hosts * (os.cpu_count() or 1)
        stages = [Stage("read", measured.read, cores), Stage("encode", measured.encode, cores)]
    assert seconds is not None
    assert stored is not None
    found = plan(
        settings.pictures or rows,
        [Stage("sample", seconds, chips), *stages],
        bytes_per_picture=stored,
        shard_size=job.shard_size,
        hosts=hosts,
        startup_seconds=0.0 if measured is None else measured.start,
        price_per_hour=settings.price,
    )
    return PlanOutcome(found, measured)


def measure(job: JobSettings, source: Source, reader: Reader, device: Device, devices: int, loading: float) -> Measured:
    """Times the first batch of rows that can be used, after a run that compiles.

    Args:
        loading: seconds that it took to have the device ready.

    Raises:
        InputError: none of the first rows can be used.
    """
    count = job.batch_size * devices
    rows = list(itertools.islice(source.rows(Wanted([range(2 * count)])), 2 * count))
    # Loads what is loaded once, such as the tokenizer.
    reader(rows[0])
    read, items = _timed(lambda: [reader(row) for row in rows])
    good = [item for item in items if item.error is None]
    good = [item for item in good if item.program == good[0].program][:count]
    if not good:
        raise InputError(f"none of the first {len(rows)} rows can be used: {items[0].error}")
    # A batch takes as long as a full one.
    good = list(itertools.islice(itertools.cycle(good), count))
    batch = Batch(good[0].size, good, [item.key for item in good])
    first, _ = _timed(lambda: run_batch(job, device, batch))
    sample, (_, results, _) = _timed(lambda: run_batch(job, device, batch))
    sampling = job.model_dump(exclude={"model"}) | reader.values.model_dump(exclude_none=True)
    told = [item.record for item in good]
    encoding, files = _timed(lambda: [encode(*each, job, sampling) for each in zip(results, told, strict=True)])
    lines = sum(len(json.dumps(item.record | {"id": _ID, "sha256": _ID})) for item in good)
    stored = sum(map(len, files)) + lines
    if not job.vectors and job.container == "tar":
        # The record again beside the picture, a header of 512 bytes for each, half a block of padding.
        stored += lines + count * 2 * (512 + 256)
    sizes = 1 if job.vectors else len(reader.sizes)
    start = loading + sizes * max(0.0, first - sample)
    return Measured(read / len(rows), sample / count * devices, encoding / count, stored / count, start)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result
