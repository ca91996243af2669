"""Iteration in other threads, with little between them: what is slow on the host does not make the device wait."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")
Consumed = TypeVar("Consumed", contravariant=True)

_SECONDS_BETWEEN_LOOKS = 0.05


class Consumer(Protocol[Consumed]):
    """What takes values one after the other, and is closed in the end, whatever has happened."""

    def __call__(self, value: Consumed, /) -> None: ...

    def close(self) -> None: ...


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Value], Result], values: Iterable[Value], ahead: int
) -> Iterator[Result]:
    """`map` in a pool's threads, in order, with no more than `ahead` results waiting."""
    futures: deque[Future[Result]] = deque()
    try:
        for value in values:
            futures.append(pool.submit(function, value))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


class Ahead(Generic[Value]):
    """Iterates in a thread of its own, at most `size` values ahead; what is raised there is raised here.

    Args:
        stopping: asked while there is nothing to take, and then ends the iteration.
    """

    def __init__(self, values: Iterator[Value], size: int, stopping: Callable[[], bool] = lambda: False) -> None:
        self._values, self._stopping = values, stopping
        self._queue: queue.Queue[tuple[Value | None, BaseException | None]] = queue.Queue(size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)

    def __enter__(self) -> Iterator[Value]:
        self._thread.start()
        return self._iterate()

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        while self._thread.is_alive():
            # The thread may wait for room.
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=_SECONDS_BETWEEN_LOOKS)

    def _run(self) -> None:
        try:
            for value in self._values:
                self._queue.put((value, None))
                if self._closed.is_set():
                    return
            self._queue.put((None, StopIteration()))
        except BaseException as error:
            self._queue.put((None, error))
        finally:
            close = getattr(self._values, "close", None)
            if close is not None:
                close()

    def _iterate(self) -> Iterator[Value]:
        while True:
            try:
                value, error = self._queue.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                if self._stopping():
                    return
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield value  # type: ignore[misc]


class Behind(Generic[Value]):
    """Consumes values in a thread of its own, at most `size` behind; what is raised there is raised at the next `put`
    or at the end. Leaving waits until all is consumed."""

    def __init__(self, consumer: Consumer[Value], size: int) -> None:
        self._consumer = consumer
        self._queue: queue.Queue[Value | None] = queue.Queue(size)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="behind", daemon=True)

    def __enter__(self) -> "Behind[Value]":
        self._thread.start()
        return self

    def put(self, value: Value) -> None:
        """Hands a value over; waits while there is no room."""
        if self._error is not None:
            raise self._error
        self._queue.put(value)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        self._consumer.close()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        while (value := self._queue.get()) is not None:
            # After an error the rest is taken and dropped, so that nobody waits for room.
            if self._error is None:
                try:
                    self._consumer(value)
                except BaseException as error:
                    self._error = error
