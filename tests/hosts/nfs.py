"""A folder as NFS clients see it, by FUSE: `python -m tests.hosts.nfs EXPORT MOUNT`, a mount for each host.

What is imitated: attributes, names that are missing and listings are seconds old; what is written is at the server once
the file is closed or synced; a file that another host removes is a stale handle to who has it open, and one that this
host removes stays under another name until it is closed (libfuse does that); locks are known to their own host alone,
as under `local_lock`. A server that is away has everything wait, and may come back without knowing the handles of
before.
"""

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

# How old what a mount shows may be.
SECONDS = 3
_AWAY, _GENERATION = ".server-is-away", ".server-generation"


@dataclass
class Server:
    """The one that has the folder. What it is at stands in files beside the folder."""

    export: Path

    @property
    def generation(self) -> str:
        """Changes when the server forgets all handles."""
        path = self.export.parent / _GENERATION
        return path.read_text() if path.exists() else ""

    @property
    def is_away(self) -> bool:
        return (self.export.parent / _AWAY).exists()

    def stop(self) -> None:
        """Answers no more."""
        (self.export.parent / _AWAY).touch()

    def start(self, *, forgetful: bool = False) -> None:
        """Answers again, and has perhaps forgotten all handles."""
        if forgetful:
            (self.export.parent / _GENERATION).write_text(self.generation + "+")
        (self.export.parent / _AWAY).unlink(missing_ok=True)


@dataclass
class Handle:
    """An open file."""

    descriptor: int
    path: str
    generation: str
    pending: list[tuple[int, bytes]] = field(default_factory=list)


@contextlib.contextmanager
def mounted(export: Path, mounts: Sequence[Path]) -> Iterator[Server]:
    """The folder under each of these paths, as on a host of its own."""
    server = Server(export)
    for mount in mounts:
        mount.mkdir(parents=True, exist_ok=True)
    processes = [subprocess.Popen([sys.executable, "-m", "tests.hosts.nfs", export, mount]) for mount in mounts]
    try:
        deadline = time.monotonic() + 60
        while not all(map(os.path.ismount, mounts)):
            if time.monotonic() > deadline or any(each.poll() is not None for each in processes):
                raise RuntimeError("a folder cannot be mounted")
            time.sleep(0.1)
        yield server
    finally:
        server.start()
        for mount in mounts:
            subprocess.run(["umount", "--lazy", str(mount)], check=False)
        for each in processes:
            each.terminate()
            each.wait()


def main() -> None:
    """Mounts until it is unmounted."""
    import mfusepy

    export, mount = map(Path, sys.argv[1:])
    server = Server(export)

    def told(work: Callable[[], Result]) -> Result:
        while server.is_away:
            time.sleep(0.05)
        try:
            return work()
        except OSError as error:
            raise mfusepy.FuseOSError(error.errno or errno.EIO) from None

    class Mount(mfusepy.Operations):  # type: ignore[misc]
        """One host's view."""

        use_ns = True

        def __init__(self) -> None:
            self.handles: dict[int, Handle] = {}
            self.listings: dict[str, tuple[float, list[str]]] = {}

        def at(self, path: str) -> str:
            return str(export) + path

        def changed(self, *paths: str) -> None:
            for path in paths:
                self.listings.pop(os.path.dirname(path), None)

        def handle(self, number: int) -> Handle:
            found = self.handles[number]
            if os.fstat(found.descriptor).st_nlink == 0 or found.generation != server.generation:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return found

        def put(self, found: Handle) -> None:
            pending, found.pending = found.pending, []
            for offset, data in pending:
                os.pwrite(found.descriptor, data, offset)

        # What the kernel asks for.

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            def work() -> dict[str, Any]:
                for each in self.handles.values():
                    if each.path == path:
                        self.put(each)
                found = os.lstat(self.at(path))
                names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size")
                times = ("st_atime", "st_mtime", "st_ctime")
                return {name: getattr(found, name) for name in names} | {
                    name: getattr(found, f"{name}_ns") for name in times
                }

            return told(work)

        def readdir(self, path: str, fh: int) -> list[str]:
            def work() -> list[str]:
                seen, names = self.listings.get(path, (0.0, []))
                if time.monotonic() - seen > SECONDS:
                    names = [".", "..", *os.listdir(self.at(path))]
                    self.listings[path] = time.monotonic(), names
                return names

            return told(work)

        def mkdir(self, path: str, mode: int) -> None:
            told(lambda: os.mkdir(self.at(path), mode))
            self.changed(path)

        def rmdir(self, path: str) -> None:
            told(lambda: os.rmdir(self.at(path)))
            self.changed(path)

        def unlink(self, path: str) -> None:
            told(lambda: os.unlink(self.at(path)))
            self.changed(path)

        def rename(self, old: str, new: str) -> None:
            def work() -> None:
                for each in self.handles.values():
                    if each.path == old:
                        each.path = new
                os.rename(self.at(old), self.at(new))

            told(work)
            self.changed(old, new)

        def link(self, target: str, source: str) -> None:
            told(lambda: os.link(self.at(source), self.at(target)))
            self.changed(target)

        def chmod(self, path: str, mode: int) -> None:
            told(lambda: os.chmod(self.at(path), mode))

        def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
            told(lambda: os.utime(self.at(path), ns=times))

        def statfs(self, path: str) -> dict[str, int]:
            def work() -> dict[str, int]:
                found = os.statvfs(self.at(path))
                names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
                return {name: getattr(found, name) for name in names}

            return told(work)

        def opened(self, path: str, flags: int, mode: int = 0o644) -> int:
            def work() -> int:
                # The client reads what it is going to write a part of.
                way = os.O_RDWR if flags & (os.O_WRONLY | os.O_RDWR) else os.O_RDONLY
                keep = os.O_CREAT | os.O_EXCL | os.O_TRUNC
                descriptor = os.open(self.at(path), way | flags & keep, mode)
                self.handles[descriptor] = Handle(descriptor, path, server.generation)
                return descriptor

            return told(work)

        def open(self, path: str, flags: int) -> int:
            return self.opened(path, flags)

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            self.changed(path)
            return self.opened(path, os.O_RDWR | os.O_CREAT, mode)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            def work() -> bytes:
                found = self.handle(fh)
                self.put(found)
                return os.pread(fh, size, offset)

            return told(work)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            told(lambda: self.handle(fh).pending.append((offset, bytes(data))))
            return len(data)

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            def work() -> None:
                if fh is None:
                    return os.truncate(self.at(path), length)
                found = self.handle(fh)
                self.put(found)
                return os.ftruncate(fh, length)

            told(work)

        def flush(self, path: str, fh: int) -> None:
            told(lambda: self.put(self.handle(fh)))

        def fsync(self, path: str, datasync: int, fh: int) -> None:
            told(lambda: self.put(self.handle(fh)))

        def release(self, path: str, fh: int) -> None:
            os.close(self.handles.pop(fh).descriptor)

    timeouts = {"attr_timeout": SECONDS, "entry_timeout": SECONDS, "negative_timeout": SECONDS}
    mfusepy.FUSE(Mount(), str(mount), foreground=True, nothreads=True, **timeouts)


if __name__ == "__main__":
    main()
