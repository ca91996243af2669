"""Where a job runs: in this process, or on a Ray cluster, whose workers do shards as a process of its own would.

The driver hands out the numbers of shards and hears what became of them; pictures never come to it. A worker may come,
go or die at any time: what it had not finished is done by another.
"""

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from sdipc_jax.batch.job import Job, Work
from sdipc_jax.batch.pipeline import Device, Progress
from sdipc_jax.batch.settings import BatchSettings, JobSettings
from sdipc_jax.compilation import keep_compiled, use_eigen
from sdipc_jax.errors import InputError, one_line, printable, shortened
from sdipc_jax.parallel.software import software
from sdipc_jax.records import Record

Stopping = Callable[[Progress], bool]
Tell = Callable[[str], None]

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_COUNTS = 5.0
# After which a person is told what no worker has been found for.
_PATIENCE = 30.0
# Shards are handed out for about so many seconds at once, so that neither the driver nor the end of a job waits long.
_SECONDS_OF_WORK = 60.0
# Workers that one shard, or getting ready, may cost.
_ATTEMPTS = 10


class Place(Protocol):
    """Where work is done.

    Attributes:
        notes: what a person should know when it is.
    """

    notes: tuple[str, ...]

    def __call__(self, work: Work, stopping: Stopping, report: Callable[[int], None]) -> Progress: ...


@dataclass
class Here:
    """This process, on its own devices."""

    job: Job
    device: Device
    notes: tuple[str, ...]

    def __call__(self, work: Work, stopping: Stopping, report: Callable[[int], None]) -> Progress:
        return self.job.do(work, self.device, stopping, report)


@contextmanager
def here(job: Job, settings: BatchSettings, make_device: Callable[..., Device], tell: Tell) -> Iterator[Place]:
    """This process, with the weights loaded."""
    yield Here(job, *job.recipe.device(make_device))


@contextmanager
def on_ray(job: Job, settings: BatchSettings, make_device: Callable[..., Device], tell: Tell) -> Iterator[Place]:
    """The cluster that `RAY_ADDRESS` names or this machine belongs to, else one of this machine alone.

    Raises:
        InputError: Ray is not installed, or the cluster is not there.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--on ray takes Ray, which is not installed: pip install 'sdipc-jax[ray]'") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            # What workers print stays in Ray's logs: the standard output is for results alone.
            ray.init(log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS', 'not set')}, and no Ray cluster answers "
                f"({shortened(one_line(error))}), expected one: see to it, or unset it"
            ) from None
    driver = _Driver(ray, job, settings, make_device, tell)
    try:
        yield driver
    finally:
        driver.close()
        if mine:
            ray.shutdown()


@dataclass(frozen=True)
class Need:
    """What a worker asks Ray for.

    Attributes:
        resource: `CPU`, `GPU`, `TPU` or a name of the cluster's own.
        amount: how many of them.
    """

    resource: str
    amount: int

    @classmethod
    def of(cls, asked: str | None, nodes: Sequence[Mapping[str, float]]) -> "Need":
        """What is asked for, else a host's TPU chips, a GPU, or a node's cores.

        >>> Need.of(None, [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}])
        Need(resource='GPU', amount=1)
        >>> Need.of("CPU=4", [])
        Need(resource='CPU', amount=4)
        """
        if asked is not None:
            name, _, amount = asked.partition("=")
            return cls(name, int(amount))
        least = {
            name: int(min(node[name] for node in nodes if node.get(name, 0) >= 1))
            for name in ("TPU", "GPU", "CPU")
            if any(node.get(name, 0) >= 1 for node in nodes)
        }
        for name in ("TPU", "GPU"):
            if name in least:
                return cls(name, 1 if name == "GPU" else least[name])
        return cls("CPU", least.get("CPU", 1))

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many workers the nodes have room for.

        >>> Need("GPU", 1).room([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}])
        4
        """
        return sum(int(node.get(self.resource, 0) // self.amount) for node in nodes)

    def options(self) -> Record:
        """As Ray takes it."""
        known = {"CPU": "num_cpus", "GPU": "num_gpus"}
        if self.resource in known:
            return {"num_cpus": 0} | {known[self.resource]: self.amount}
        return {"num_cpus": 0, "resources": {self.resource: self.amount}}

    def __str__(self) -> str:
        return f"{self.resource}={self.amount}"


class Worker:
    """What Ray makes an actor of: a process on a node that does shards of a job.

    Args:
        folder: the driver's, from which relative paths start.
        versions: the driver's `software()`.
    """

    def __init__(
        self, job: JobSettings, folder: str, offline: bool, versions: Record, make_device: Callable[..., Device]
    ) -> None:
        self.settings, self.folder, self.offline, self.versions = job, folder, offline, versions
        self.make_device = make_device

    def start(self) -> tuple[str, ...]:
        """Loads the weights; gives what a person should know.

        Raises:
            InputError: this node has other software, files or folders than the driver.
        """
        with _named():
            use_eigen()
            keep_compiled()
            if self.offline:
                os.environ["HF_HUB_OFFLINE"] = "1"
            with suppress(OSError):
                # Without it only whole paths are found, and relative ones are missing by name.
                os.chdir(self.folder)
            for name, here in software().items():
                if here != self.versions[name]:
                    raise InputError(
                        f"{name} is {here} there and {self.versions[name]} with the driver, expected the same software "
                        "on all nodes: install it"
                    )
            self.job = Job.make(self.settings)
            self.job.manifest.check()
            self.device, notes = self.job.recipe.device(self.make_device)
            return notes

    def work(self, work: Work, most_failures: int | None) -> Progress:
        """Does what is left of some shards.

        Args:
            most_failures: stop when more rows than this have failed.
        """
        with _named():
            return self.job.do(
                work,
                self.device,
                lambda progress: most_failures is not None and progress.failed > most_failures,
            )


@dataclass(frozen=True)
class _Lease:
    """Shards that a worker is at."""

    worker: Any
    work: Work
    since: float = field(default_factory=time.monotonic)


class _Driver:
    """Hands out what is left of a job until it is done."""

    def __init__(
        self, ray: Any, job: Job, settings: BatchSettings, make_device: Callable[..., Device], tell: Tell
    ) -> None:
        self.ray, self.job, self.settings, self.tell = ray, job, settings, tell
        self.arguments = (job.settings, os.getcwd(), settings.offline, software(), make_device)
        self.actor = ray.remote(Worker)
        self.need = Need.of(settings.worker_needs, self._nodes())
        self.notes: tuple[str, ...] = ()
        self.progress = Progress()
        # Calls that are under way, by what Ray gives for them.
        self.starting: dict[Any, Any] = {}
        self.leases: dict[Any, _Lease] = {}
        self.idle: list[Any] = []
        self.queue: deque[int] = deque()
        # Workers that were lost, by the shard that they were at; None while they got ready.
        self.lost: Counter[int | None] = Counter()
        self.losses = 0
        self.seconds_a_shard = _SECONDS_OF_WORK
        self.counted = -_SECONDS_BETWEEN_COUNTS
        self.waiting_since: float | None = None

    def __call__(self, work: Work, stopping: Stopping, report: Callable[[int], None]) -> Progress:
        self.left = work
        self.queue.extend(work.shards)
        while (self.queue or self.leases) and not stopping(self.progress):
            self._start_workers()
            self._hand_out()
            calls = [*self.starting, *self.leases]
            ready, _ = self.ray.wait(calls, num_returns=1, timeout=_SECONDS_BETWEEN_LOOKS)
            for call in ready:
                self._take(call)
                report(self.progress.done + self.progress.failed)
        return self.progress

    def close(self) -> None:
        """Ends all workers. What they had begun leaves nothing under its name."""
        workers = [*self.starting.values(), *self.idle, *(lease.worker for lease in self.leases.values())]
        for worker in workers:
            self._end(worker)
        if self.losses:
            self.notes += (f"{self.losses} workers were lost, and what they had not finished was begun again",)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _start_workers(self) -> None:
        """As many as there is room for, those that Ray has no place for yet included."""
        now = time.monotonic()
        there = len(self.starting) + len(self.idle) + len(self.leases)
        if there and now < self.counted + _SECONDS_BETWEEN_COUNTS:
            return
        self.counted = now
        nodes = self._nodes()
        wanted = min(self.settings.workers or max(1, self.need.room(nodes)), len(self.queue) + len(self.leases))
        for _ in range(wanted - there):
            options = self.need.options() | {"max_restarts": 0, "scheduling_strategy": "SPREAD"}
            worker = self.actor.options(**options).remote(*self.arguments)
            self.starting[worker.start.remote()] = worker
        if self.idle or self.leases or self.need.room(nodes):
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = now
        elif now > self.waiting_since + _PATIENCE:
            self.waiting_since = float("inf")
            self.tell(f"no node of the cluster has {self.need} for a worker: waiting for one (or see --worker-needs)")

    def _hand_out(self) -> None:
        while self.idle and self.queue:
            workers = len(self.idle) + len(self.leases)
            count = max(1, min(int(_SECONDS_OF_WORK / self.seconds_a_shard), len(self.queue) // (2 * workers)))
            work = self.left.only([self.queue.popleft() for _ in range(count)])
            most = self.settings.max_failures
            most = None if most is None else most - self.progress.failed
            worker = self.idle.pop()
            self.leases[worker.work.remote(work, most)] = _Lease(worker, work)

    def _take(self, call: Any) -> None:
        """What has become of a call."""
        worker = self.starting.get(call) or self.leases[call].worker
        lease = self.leases.get(call)
        try:
            result = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise
        except self.ray.exceptions.RayError as error:
            self._forget(call)
            self._end(worker)
            self._lost(lease, _reason(error))
            return
        self._forget(call)
        self.idle.append(worker)
        if lease is None:
            self.lost[None] = 0
            self.notes += tuple(note for note in result if note not in self.notes)
        else:
            self.progress.add(result)
            self.seconds_a_shard = max(1e-3, (time.monotonic() - lease.since) / len(lease.work.shards))

    def _forget(self, call: Any) -> None:
        self.starting.pop(call, None)
        self.leases.pop(call, None)

    def _end(self, worker: Any) -> None:
        # Also one that Ray could only not reach, so that it does not do again what another does.
        with suppress(Exception):
            self.ray.kill(worker)

    def _lost(self, lease: _Lease | None, reason: str) -> None:
        """Counts what a lost worker had finished, and puts back the rest."""
        again: list[int] = []
        if lease is not None:
            whole, partly = self.job.left(lease.work.whole), self.job.left(lease.work.partly, retry_failed=True)
            for header in (*whole.finished, *partly.finished):
                rows = lease.work.partly.get(header.shard, range(header.rows))
                done = Progress(done=len(rows) - header.failed, failed=header.failed, shards=1)
                done.failures += self.job.failures(header.shard)
                self.progress.add(done)
            again = sorted([*whole.shards, *partly.shards])
            self.left.partly.update(partly.partly)
        at = again[0] if again else None
        self.counted = -_SECONDS_BETWEEN_COUNTS
        if lease is not None and at is None:
            return
        self.lost[at] += 1
        self.losses += 1
        what = "while it got ready" if at is None else f"at shard {at}, which another one does"
        self.tell(f"a worker was lost {what}: {reason}")
        if self.lost[at] < _ATTEMPTS:
            self.queue.extendleft(reversed(again))
        elif at is None:
            raise InputError(
                f"{_ATTEMPTS} workers were lost one after the other before they were ready, the last so: {reason}: see "
                "the nodes' memory and Ray's logs"
            )
        else:
            self.queue.extendleft(reversed(again[1:]))
            given_up = (
                f"shard {at} was given up, since {_ATTEMPTS} workers were lost at it, the last so: {reason}: see its "
                "rows and the nodes' memory, and start the job again"
            )
            self.progress.failures.insert(0, {"error": given_up})


@contextmanager
def _named() -> Iterator[None]:
    """Says of what is refused on which node it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"on {printable(socket.gethostname())}: {error}") from None


def _reason(error: Exception) -> str:
    """The line of Ray's that says why."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if " because " in line), " ".join(filter(None, lines)))
    return shortened(told, 200)
