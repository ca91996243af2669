"""Stopping on request, and keeping others out: signals and the lock of a run's folder."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from sdipc_jax.errors import InputError, InterruptedRun, printable

_KILLED = 130
_LOCK = "lock"


class Interruption:
    """SIGTERM and the first SIGINT ask to stop; a second SIGINT ends the process at once with exit code 130.

    with Interruption() as interruption:
        for item in items:
            if interruption.requested:
                ...  # save, and raise InterruptedRun

    "At once" holds while a program compiles or runs on a device, too, where Python's own handlers wait. Signal
    handlers belong to the main thread; in another one nothing is caught. The former handlers come back at the end.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._signals: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self._requested.is_set()

    def check(self) -> None:
        """Stops where there is nothing to save yet.

        Raises:
            InterruptedRun: if asked to stop.
        """
        if self.requested:
            raise InterruptedRun("interrupted before there was anything new to save: the same command starts again")

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._signals = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._signals:
            return
        for number, handler in self._signals.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._former_descriptor)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        # A thread of its own, which runs while the main one waits for the device.
        interrupts = 0
        while caught := os.read(self._read, 1):
            interrupts += caught[0] == signal.SIGINT
            if interrupts > 1:
                os._exit(_KILLED)
            if caught[0] in self._signals:
                self._requested.set()


def try_lock(descriptor: int) -> bool:
    """Locks an open file or folder for this process; False where the system or the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl  # Not on every system.

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Keeps every other process out of a folder, which is made if it is missing.

    The lock goes with the process that holds it: one that was killed locks nothing.

    Yields:
        What a person should know where the file system has no locks, else None.

    Raises:
        InputError: another process is at work there, or the folder cannot be written.
    """
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise InputError(
            f"{printable(folder)}: cannot write there ({error.strerror}), expected a folder to write to: choose another"
        ) from None
    with stream:
        try:
            has_lock = try_lock(stream.fileno())
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip()
            raise InputError(
                f"{printable(folder)}: process {holder or 'unknown'} is at work there, expected no other: wait for it, "
                "or choose another folder"
            ) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        try:
            yield None if has_lock else f"{printable(folder)} cannot be locked: start no second process there"
        finally:
            # Others may hold the file open by now: emptied, not removed.
            with contextlib.suppress(OSError):
                stream.truncate(0)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Handled by the thread that reads the wake-up descriptor."""
