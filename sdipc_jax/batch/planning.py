"""How long a large job takes, what it costs and what it stores: arithmetic on measured numbers.

plan(
    100_000_000,
    [Stage("sample", seconds=1.05, workers=256), Stage("encode", seconds=0.06, workers=64 * 100)],
    bytes_per_picture=460_000,
    shard_size=10_000,
    price_per_hour=256 * 1.20,
)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from sdipc_jax.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A part of the work that overlaps with the others.

    Attributes:
        name: such as read, sample, encode, write.
        seconds: that one worker takes for one picture. For a line or a disk: bytes a picture over bytes a second.
        workers: at once: chips, cores, hosts.
    """

    name: str
    seconds: float
    workers: int

    @property
    def pictures_per_second(self) -> float:
        return self.workers / self.seconds


@dataclass(frozen=True)
class Plan:
    """What a job comes to.

    Attributes:
        pictures: of the job.
        seconds: from start to end, the start-up included.
        pictures_per_second: while it runs.
        slowest: the name of the stage that all others wait for.
        busy: the share of the time in which each stage has work, by name; 1 for the slowest.
        bytes: stored in the end.
        shards: of `shard_size` pictures, the last one not full.
        seconds_per_shard: that a host works on one; what a kill costs at most.
        cost: in the currency of the price; None without one.
    """

    pictures: int
    seconds: float
    pictures_per_second: float
    slowest: str
    busy: dict[str, float]
    bytes: int
    shards: int
    seconds_per_shard: float
    cost: float | None

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:,.2f}"
        busy = ", ".join(f"{name} {share:.0%}" for name, share in self.busy.items())
        return (
            f"{self.pictures:,} pictures in {duration(self.seconds)} ({self.pictures_per_second:.4g} a second), "
            f"{_size(self.bytes)} in {self.shards:,} shards of {duration(self.seconds_per_shard)} each{cost}\n"
            f"{self.slowest} is the slowest; busy: {busy}"
        )


def plan(
    pictures: int,
    stages: Sequence[Stage],
    *,
    bytes_per_picture: float,
    shard_size: int,
    hosts: int = 1,
    startup_seconds: float = 0.0,
    price_per_hour: float | None = None,
) -> Plan:
    """Works out a job whose stages overlap, so that it runs at the pace of the slowest.

    Args:
        pictures: how many to make.
        stages: at least one.
        bytes_per_picture: stored, with its share of the manifest.
        shard_size: pictures a shard.
        hosts: that work on a shard each, and have equal parts of all workers.
        startup_seconds: loading and compiling, before the first picture.
        price_per_hour: of all machines together, in any currency.

    Raises:
        InputError: a number that is not positive, or no stages.

    >>> print(plan(10_000, [Stage("sample", 2.0, 8), Stage("encode", 0.1, 1)], bytes_per_picture=5e5, shard_size=1000))
    10,000 pictures in 41 min 40 s (4 a second), 5 GB in 10 shards of 4 min 10 s each
    sample is the slowest; busy: sample 100%, encode 40%
    """
    numbers = {"pictures": pictures, "shard_size": shard_size, "hosts": hosts, "bytes_per_picture": bytes_per_picture}
    for stage in stages:
        numbers |= {f"{stage.name}.seconds": stage.seconds, f"{stage.name}.workers": stage.workers}
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}, expected a positive number: correct it")
    if not stages:
        raise InputError("there are no stages, expected at least one: give what a picture takes")
    slowest = min(stages, key=lambda stage: stage.pictures_per_second)
    rate = slowest.pictures_per_second
    shards = ceil(pictures / shard_size)
    # Hosts take whole shards in turn, so the first has most, and the job ends when it does.
    before_its_last = (ceil(shards / hosts) - 1) * shard_size
    its_last = shard_size if (shards - 1) % hosts else pictures - (shards - 1) * shard_size
    seconds = startup_seconds + (before_its_last + its_last) * hosts / rate
    return Plan(
        pictures=pictures,
        seconds=seconds,
        pictures_per_second=rate,
        slowest=slowest.name,
        busy={stage.name: rate / stage.pictures_per_second for stage in stages},
        bytes=ceil(pictures * bytes_per_picture),
        shards=shards,
        seconds_per_shard=min(shard_size, pictures) * hosts / rate,
        cost=None if price_per_hour is None else seconds / 3600 * price_per_hour,
    )


def duration(seconds: float) -> str:
    """A time to read.

    >>> duration(9.26), duration(3700), duration(412345)
    ('9.3 s', '1 h 2 min', '4 d 19 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    first = next(place for place, (_, size) in enumerate(units) if seconds >= size)
    (large, size), (small, part) = units[first], units[first + 1]
    whole, rest = divmod(round(seconds / part), size // part)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
