"""Ends a process that hangs, so that a job manager starts the job again."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from types import TracebackType
from typing import Self

# What job managers take for "try again" (EX_TEMPFAIL).
EXIT_CODE = 75
_REMEMBERED = 100
_TICKS = 20


class Watchdog:
    """Watches over steps that should all take about the same time.

    A step that takes longer than `max(factor x median, least)` is taken to hang, as one does that waits for a process
    which is alive but stuck: the stacks of all threads go to stderr and the process ends at once with exit code 75.
    No cleanup runs, which would hang as well. The first step compiles and has no limit.

    with Watchdog() as watchdog:
        for batch in batches:
            with watchdog.step():
                ...  # must wait for the device, as `jax.block_until_ready` does

    Args:
        factor: how many times the usual time a step may take.
        least: seconds that any step may take.
    """

    def __init__(self, factor: float = 10.0, least: float = 120.0) -> None:
        self.factor, self.least = factor, least
        self._first: float | None = None
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._limit: float | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(None, closed=True)
        self._thread.join()

    @property
    def limit(self) -> float | None:
        """Seconds that the next step may take; None before the first is done."""
        if self._first is None:
            return None
        # With compilation in it, the first step's time is too long, but stands for all until there is a second.
        return max(self.factor * median(self._seconds or [self._first]), self.least)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, watched from here to its end. One at a time."""
        started = time.monotonic()
        self._set(self.limit)
        try:
            yield
        finally:
            self._set(None)
        seconds = time.monotonic() - started
        if self._first is None:
            self._first = seconds
        else:
            self._seconds.append(seconds)

    def _set(self, limit: float | None, closed: bool = False) -> None:
        with self._changed:
            self._limit, self._closed = limit, closed
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                if self._limit is None:
                    self._changed.wait()
                elif self._over(self._limit):
                    self._end(self._limit)

    def _over(self, limit: float) -> bool:
        """Waits for the step's end, or for its limit: ticks are counted, so that the time in which the whole process
        was stopped, as with Ctrl-Z, does not count."""
        return not any(self._changed.wait(limit / _TICKS) for _ in range(_TICKS))

    def _end(self, limit: float) -> None:
        print(
            f"sdipc: a step has taken more than {limit:.3g} s, the usual is "
            f"{median(self._seconds or [self._first or 0]):.3g} s: the process ends with exit code {EXIT_CODE}, "
            "start it again; what each thread was at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(EXIT_CODE)
