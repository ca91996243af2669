"""The queue in front of the device: so many wait, more are refused at once, and one at a time is worked on."""

import contextlib
import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sdipc_jax.errors import InputError
from sdipc_jax.records import Record

PLACES = 16
# Of the mean that tells how long to wait.
_REMEMBERED = 8

BUSY = "busy: {} requests wait already, expected fewer: try again in {} seconds"
ENDING = "the page is ending, and takes or begins nothing more: ask again when it is back"
CANCELLED = "cancelled"


class Refused(Exception):
    """No place in the queue: the message says why.

    Attributes:
        seconds: after which it is worth to try again.
    """

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class Cancelled(Exception):
    """Raised in the middle of work that nobody waits for any more."""


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        work: what is called on the device's thread, with what it reports its progress to; it gives the outcome.
        state: `waiting`, `running`, or how it ended: `done`, `failed`, `cancelled` or `refused`.
        status: the HTTP status that says so.
        done: the share of the work, 0 to 1.
        error: why there is no outcome.
    """

    work: Callable[[Callable[..., None]], Record]
    state: str = "waiting"
    status: int = 200
    done: float = 0.0
    outcome: Record = field(default_factory=dict)
    error: str | None = None
    started: float = 0.0
    _unwanted: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in ("waiting", "running")

    def end(self, state: str, status: int = 200, error: str | None = None) -> None:
        """The end, unless it was reached before."""
        if not self.ended:
            self.status, self.error, self.state = status, error, state

    def report(self, done: float, text: str = "") -> None:
        """What the work calls from time to time, and what ends it if nobody waits any more."""
        self.done = done
        if self._unwanted is not None:
            raise Cancelled(self._unwanted)


class Queue:
    """Jobs in their order. Any thread may ask; one alone works.

    Args:
        places: of those that wait, besides the one that is worked on.

    Attributes:
        over: set when it is closed and nothing is worked on any more.
    """

    def __init__(self, places: int = PLACES) -> None:
        self.places = places
        self.running: Job | None = None
        self.closed = False
        self.over = threading.Event()
        self._waiting: deque[Job] = deque()
        self._taken = 0
        self._changed = threading.Condition()
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def waiting(self) -> int:
        """How many wait, those among them whose files are still read."""
        return len(self._waiting) + self._taken

    @property
    def has_room(self) -> bool:
        """Whether another one would be taken."""
        # A device that does nothing takes one from the queue at once.
        return not self.closed and self.waiting < self.places + (self.running is None)

    def wait(self) -> int:
        """Seconds after which there is probably room."""
        known = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return max(1, math.ceil(known))

    @contextlib.contextmanager
    def place(self) -> Iterator[Callable[[Job], None]]:
        """A place, kept while a request is read and checked; what is yielded puts a job there.

        Raises:
            Refused: there is none, or the queue is closed.
        """
        with self._changed:
            if self.closed:
                raise Refused(ENDING, self.wait())
            if not self.has_room:
                raise Refused(BUSY.format(self.waiting, self.wait()), self.wait())
            self._taken += 1
        free = [True]

        def put(job: Job) -> None:
            with self._changed:
                free.clear()
                self._taken -= 1
                if self.closed:
                    job.end("refused", 503, ENDING)
                    return
                self._waiting.append(job)
                self._changed.notify_all()

        try:
            yield put
        finally:
            with self._changed:
                self._taken -= len(free)

    def ahead(self, job: Job) -> int:
        """How many come before it."""
        with self._changed:
            before = self._waiting.index(job) if job in self._waiting else 0
            return before + (self.running is not None and self.running is not job)

    def cancel(self, job: Job, reason: str = CANCELLED) -> None:
        """One that waits never begins; one that is worked on stops at its next report."""
        with self._changed:
            job._unwanted = reason
            if job in self._waiting:
                self._waiting.remove(job)
                job.end("cancelled", 499, reason)

    def close(self) -> None:
        """Takes nothing more, and tells those that wait; what is worked on goes on."""
        with self._changed:
            self.closed = True
            while self._waiting:
                self._waiting.popleft().end("refused", 503, ENDING)
            self._changed.notify_all()

    def work(self) -> None:
        """Works on one job after the other until the queue is closed, on the thread that owns the device."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.closed)
                if not self._waiting:
                    self.over.set()
                    return
                job = self._waiting.popleft()
                self.running, job.state, job.started = job, "running", time.monotonic()
            _work_on(job)
            with self._changed:
                self.running = None
                if job.state == "done":
                    self._seconds.append(time.monotonic() - job.started)


def _work_on(job: Job) -> None:
    """Whatever goes wrong is this job's alone."""
    try:
        job.report(0.0)
        job.outcome = job.work(job.report)
        job.done = 1.0
        job.end("done")
    except Cancelled as reason:
        job.end("cancelled", 503 if str(reason) == ENDING else 499, str(reason))
    except InputError as error:
        job.end("failed", 422, str(error))
    except MemoryError as error:
        job.end("failed", 507, str(error))
    except Exception:
        traceback.print_exc(file=sys.stderr)
        job.end("failed", 500, "a bug, which the page's own output tells more of: say what you did where bugs are told")
