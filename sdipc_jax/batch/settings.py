"""What people type: the command's options, the job's file, and a row of the data set."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import Field, model_validator

from sdipc_jax.datasets.controls import RowControls
from sdipc_jax.errors import InputError
from sdipc_jax.files import read_settings
from sdipc_jax.settings import (
    Alpha,
    CommandSettings,
    Count,
    Positive,
    ProjectionSettings,
    SamplerSettings,
    Side,
    SizeSettings,
    Text,
)

# Where launchers write which process this is, and of how many; the first pair that is set counts.
_LAUNCHERS = (
    ("SDIPC_PROCESS_INDEX", "SDIPC_PROCESS_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)

_PLANNED = ("pictures", "seconds", "bytes", "chips", "hosts", "price")
_Path = Annotated[str, Field(min_length=1)]


def _option(metavar: str, default: str) -> Any:
    return tyro.conf.arg(constructor=str, metavar=metavar, help_behavior_hint=f"(default: {default})")


class BatchSettings(CommandSettings):
    """Resumable generation over a data set: run it again, and it goes on where it stopped."""

    job: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="JOB.yaml")]
    """The job's file; docs/settings.md has its keys."""
    process_index: Annotated[Annotated[int, Field(ge=0)] | None, _option("INT", "as the launcher says, else 0")] = None
    """Which of the processes this is: it takes the shards with shard % process_count == process_index."""
    process_count: Annotated[Count | None, _option("INT", "as the launcher says, else 1")] = None
    """How many processes share the job."""
    on: Annotated[Literal["ray"] | None, _option("ray", "this process")] = None
    """Have the workers of a Ray cluster do the job: the cluster that RAY_ADDRESS names or this machine belongs to, else
    one of this machine alone."""
    workers: Annotated[Count | None, _option("INT", "as many as there is room for, now and later")] = None
    """With --on: how many at most. Ray's autoscaler sees those that find no room."""
    worker_needs: Annotated[
        Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*=[1-9]\d{0,5}$")] | None,
        _option("NAME=INT", "a host's chips TPU=N, else GPU=1, else a node's cores CPU=N"),
    ] = None
    """With --on: what each worker asks Ray for, such as CPU=8 or GPU=1."""
    verify: bool = False
    """Read every finished shard and do those again that are damaged; otherwise their sizes are compared."""
    retry_failed: bool = False
    """Try the failed rows of finished shards again."""
    max_failures: Annotated[Annotated[int, Field(ge=0)] | None, _option("INT", "no limit")] = None
    """Stop when more rows than this have failed in this run."""

    plan: bool = False
    """Say how long the job will take, what it will store and cost; write nothing."""
    pictures: Annotated[Count | None, _option("INT", "the job's rows")] = None
    """With --plan: how many."""
    seconds: Annotated[Positive | None, _option("FLOAT", "measured here, on a batch")] = None
    """With --plan: what a chip takes for a picture."""
    bytes: Annotated[Positive | None, _option("FLOAT", "measured here, on a batch")] = None
    """With --plan: what is stored of a picture, with its records."""
    chips: Annotated[Count | None, _option("INT", "those of this machine")] = None
    """With --plan: of all hosts together."""
    hosts: Annotated[Count | None, _option("INT", "1")] = None
    """With --plan: each with as many cores as this machine."""
    price: Annotated[Positive | None, _option("FLOAT", "none")] = None
    """With --plan: of all machines together for an hour."""

    @model_validator(mode="after")
    def _only_with_plan(self) -> Self:
        given = [name for name in _PLANNED if getattr(self, name) is not None]
        if given and not self.plan:
            raise ValueError(f"found {given[0]} without plan, expected both or neither: add --plan")
        return self

    @model_validator(mode="after")
    def _one_way_of_sharing(self) -> Self:
        for name in ("workers", "worker_needs"):
            if getattr(self, name) is not None and self.on is None:
                raise ValueError(f"found {name.replace('_', '-')} without on, expected both or neither: add --on ray")
        if self.on is not None and (self.plan or self.process_count is not None):
            other = "plan" if self.plan else "process-count"
            raise ValueError(f"found both on and {other}, expected one of them: leave the other out")
        return self

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.process_index is None) != (self.process_count is None):
            raise ValueError("found one of process-index and process-count, expected both: give the other one too")
        return self

    def launcher(self) -> str | None:
        """What says which process this is and of how many, where no option does: the variable with their number."""
        if self.process_count is not None or self.on is not None:
            return None
        return next((count for index, count in _LAUNCHERS if {index, count} <= os.environ.keys()), None)

    def process(self) -> tuple[int, int]:
        """(index, count), from the options or the launcher's environment; neither needs `jax.distributed`.

        Raises:
            InputError: they are no numbers, or the index is not below the count.
        """
        found: tuple[Any, Any] = (self.process_index, self.process_count)
        if self.process_count is None:
            pairs = {count: index for index, count in _LAUNCHERS}
            found = (0, 1) if (name := self.launcher()) is None else (os.environ[pairs[name]], os.environ[name])
        try:
            index, count = map(int, found)
        except ValueError:
            index, count = -1, 0
        if not 0 <= index < count:
            raise InputError(
                f"process-index is {found[0]} and process-count {found[1]}, expected an index from 0 to count - 1: "
                "correct them"
            )
        return index, count


class JobSettings(SamplerSettings, SizeSettings, ProjectionSettings, RowControls):
    """A job's file."""

    source: _Path | tuple[_Path, ...]
    """A folder of pictures, .jsonl files, .tar shards or .parquet files, here or on any path that etils.epath opens
    (docs/datasets.md). Names may hold `*` and `{00..07}`."""
    output_dir: _Path = "out"
    """Where the shards go, here or on any path that etils.epath opens."""
    columns: dict[str, str] | None = None
    """Which column gives which of a row's settings, such as `{picture: image}`; every other column is ignored. Without
    it, all columns have to be settings of a row."""
    text: Text | None = None
    """What to change in every picture (eq. 8), where its row says nothing."""
    alpha: Alpha = 0.9
    """Weight of that text."""
    controlnet: tuple[str, ...] = ()
    """ControlNets that were made for the checkpoint: diffusers' folders, ids on the hub, safetensors files. Each row
    then has a `control_image` for each of them."""
    control_detector: Literal["none", "canny"] = "none"
    """What finds in those pictures what the networks are to be shown: their edges."""
    sizes: tuple[tuple[Side, Side], ...] = ()
    """[height, width] that rows may ask for besides the job's own. Each is compiled once."""
    vectors: bool = False
    """Write the pictures' vectors (eq. 6, bfloat16) and sample nothing."""
    container: Literal["tar", "folder"] = "tar"
    """What a shard of pictures is."""
    format: Literal["png", "webp"] = "png"
    """Of the pictures."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """WebP's; 100 is lossless."""
    shard_size: Count = 1024
    """Rows in a shard: what is done again at most after a kill. Best a multiple of the batch on all devices."""
    batch_size: Count = 16
    """Pictures that a device samples at once."""


def read_job(path: Path) -> JobSettings:
    """A job's file.

    Raises:
        InputError: it cannot be read, is no YAML mapping, or holds what is no setting of a job.
    """
    return read_settings(path, JobSettings, "a job")
