"""Hands the shards of a job to the workers of a Ray cluster, which come, go and die as they like.

The driver knows the numbers of shards and hears what became of them; pictures never come to it.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sdipc_jax.batch.job import Job, Work
from sdipc_jax.batch.pipeline import Device, Progress
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.batch.workers import Need, Worker
from sdipc_jax.errors import InputError, shortened
from sdipc_jax.parallel.software import software

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
SECONDS_FOR_AN_ANSWER = 10.0
# What nodes have that a person is told of.
_SHOWN = ("CPU", "GPU", "TPU")


@dataclass(frozen=True)
class _Lease:
    """Shards that a worker is at."""

    worker: Any
    work: Work
    since: float = field(default_factory=time.monotonic)


class Driver:
    """Hands out what is left of a job until it is done.

    Args:
        ray: the module, connected to a cluster.
        make_device: makes a worker's device, from `Sampler.make`'s arguments.
        tell: called with what a person should know at once.
    """

    def __init__(
        self, ray: Any, job: Job, settings: BatchSettings, make_device: Callable[..., Device], tell: Tell
    ) -> None:
        self.ray, self.job, self.settings, self.tell = ray, job, settings, tell
        self.arguments = (job.settings, os.getcwd(), settings.offline, software(), make_device)
        self.actor = ray.remote(Worker)
        self.notes: tuple[str, ...] = ()
        self.progress = Progress()
        # Calls that are under way, by what Ray gives for them.
        self.starting: dict[Any, Any] = {}
        self.leases: dict[Any, _Lease] = {}
        self.idle: list[Any] = []
        self.queue: deque[int] = deque()
        # Nodes that a worker has refused to work on.
        self.refused: set[str] = set()
        # Workers that were lost, by the shard that they were at; None while they got ready.
        self.lost: Counter[int | None] = Counter()
        self.losses = 0
        self.seconds_a_shard = _SECONDS_OF_WORK
        self.counted = -_SECONDS_BETWEEN_COUNTS
        self.nodes = 0
        self.told = ""
        self.waiting_since: float | None = None
        self.need = Need.of(settings.worker_needs, self._nodes())

    def __call__(self, work: Work, stopping: Stopping, report: Callable[[int], None]) -> Progress:
        """Does what is left.

        Raises:
            InputError: no node will do, or workers are lost before they are ready.
        """
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
            self.notes += (f"workers that were lost: {self.losses}; what they had not finished was begun again",)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"] and node["NodeID"] not in self.refused]

    def _there(self) -> int:
        """How many workers are ready, or get so."""
        return len(self.starting) + len(self.idle) + len(self.leases)

    def _start_workers(self) -> None:
        """As many as there is room for, those that Ray has no place for yet included."""
        now = time.monotonic()
        there = self._there()
        if there and now < self.counted + _SECONDS_BETWEEN_COUNTS:
            return
        self.counted = now
        nodes = self._nodes()
        if len(nodes) > self.nodes:
            # One that has come may do better than those on which none got ready.
            self.lost[None] = 0
        self.nodes = len(nodes)
        if there and self.lost[None] >= _ATTEMPTS:
            return
        wanted = min(self.settings.workers or max(1, self.need.room(nodes)), len(self.queue) + len(self.leases))
        for _ in range(wanted - there):
            options = self.need.options(self.refused) | {"max_restarts": 0, "scheduling_strategy": "SPREAD"}
            worker = self.actor.options(**options).remote(*self.arguments)
            self.starting[worker.start.remote()] = worker
        if self.idle or self.leases or self.need.room(nodes):
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = now
        elif now > self.waiting_since + _PATIENCE:
            self.waiting_since = float("inf")
            have = sorted({str(Need(name, int(node[name]))) for node in nodes for name in _SHOWN if node.get(name)})
            self.tell(
                f"no node of the cluster has {self.need} for a worker, they have {' or '.join(have) or 'nothing'}: "
                "waiting for one (or see --worker-needs)"
            )

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
        lease = self.leases.pop(call, None)
        worker = self.starting.pop(call) if lease is None else lease.worker
        try:
            result = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, InputError):
                self.idle.append(worker)
                raise
            self._refused(worker, lease, str(error.cause))
            return
        except self.ray.exceptions.RayError as error:
            self._end(worker)
            self._lost(lease, _reason(error))
            return
        self.idle.append(worker)
        if lease is None:
            self.lost[None] = 0
            self.notes += tuple(note for note in result if note not in self.notes)
        else:
            self.progress.add(result)
            self.seconds_a_shard = max(1e-3, (time.monotonic() - lease.since) / len(lease.work.shards))

    def _end(self, worker: Any) -> None:
        # Also one that Ray could only not reach, so that it does not do again what another does.
        with suppress(Exception):
            self.ray.kill(worker)

    def _refused(self, worker: Any, lease: _Lease | None, reason: str) -> None:
        """Keeps a node out that will not do: the others go on without it, if there are any."""
        former = len(self.refused)
        with suppress(Exception):
            self.refused.add(self.ray.get(worker.node.remote(), timeout=SECONDS_FOR_AN_ANSWER))
        self._end(worker)
        room = self.need.room(self._nodes()) if self.refused else 0
        if not (self._there() or room):
            raise InputError(reason)
        if len(self.refused) > former:
            self.tell(f"{reason} (the others go on without it)")
        self.queue.extendleft(reversed(self._unfinished(lease.work) if lease else []))
        self.counted = -_SECONDS_BETWEEN_COUNTS

    def _unfinished(self, work: Work) -> list[int]:
        """Counts what a worker had finished that is no more; gives the rest."""
        again = []
        for shard in work.shards:
            if (header := self.job.finished(work, shard)) is None:
                again.append(shard)
                continue
            rows = work.partly.get(shard, range(header.rows))
            done = Progress(done=len(rows) - header.failed, failed=header.failed, shards=1)
            done.failures += self.job.failures(shard)
            self.progress.add(done)
        return again

    def _lost(self, lease: _Lease | None, reason: str) -> None:
        """Puts back what a lost worker had not finished."""
        again = self._unfinished(lease.work) if lease else []
        at = again[0] if again else None
        self.counted = -_SECONDS_BETWEEN_COUNTS
        if lease is not None and at is None:
            return
        self.lost[at] += 1
        self.losses += 1
        what = "while it got ready" if at is None else f"at shard {at}, which another one does"
        line = f"a worker was lost {what}: {reason}"
        if line != self.told:
            self.tell(line)
        self.told = line
        if self.lost[at] < _ATTEMPTS or (at is None and self._there()):
            self.queue.extendleft(reversed(again))
        elif at is None:
            raise InputError(
                f"{_ATTEMPTS} workers were lost one after the other before they were ready, the last so: {reason}: see "
                "the nodes' software and memory, and Ray's logs"
            )
        else:
            self.queue.extendleft(reversed(again[1:]))
            given_up = (
                f"shard {at} was given up, since {_ATTEMPTS} workers were lost at it, the last so: {reason}: see its "
                "rows and the nodes' memory, and start the job again"
            )
            self.progress.failures.insert(0, {"error": given_up})


def _reason(error: Exception) -> str:
    """The line of Ray's that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "creation task" in lines[0]:
        # Of a node that cannot import what a worker is made of, only the last line says so.
        return shortened(f"it could not be made there ({lines[-1]})", 200)
    return shortened(next((line for line in lines if " because " in line), " ".join(lines)), 200)
