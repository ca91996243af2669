"""Files, here or on an object store: read and written with retries, whole under their names or not there at all."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from etils import epath

from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import rename
from sdipc_jax.interruption import try_lock
from sdipc_jax.pictures.reading import MAX_BYTES, read_bytes

Result = TypeVar("Result")

ATTEMPTS = 5
_FIRST_PAUSE = 0.5
# What NFS has at most by itself (acdirmax), and a little more.
_REMEMBERED = 65.0
# What another attempt cannot change.
_PERMANENT = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EROFS, errno.EINVAL, errno.EEXIST),
}


def retrying(work: Callable[[], Result]) -> Result:
    """Up to five attempts, with pauses of 0.5, 1, 2 and 4 seconds, as long as the storage is at fault.

    Raises:
        OSError, InputError: those of the last attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (OSError, InputError) as error:
            fault = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(fault, OSError) or fault.errno in _PERMANENT or attempt == ATTEMPTS - 1:
                raise
            time.sleep(_FIRST_PAUSE * 2**attempt)
    raise AssertionError


def is_local(path: epath.Path) -> bool:
    """Whether the path is on a file system, which has renames."""
    return "://" not in os.fspath(path)


def read_input(path: epath.Path) -> bytes:
    """An input's bytes, at most 200 MB.

    Raises:
        InputError: there is none, it is empty or too large, or it cannot be read.
    """
    return retrying(lambda: read_bytes(os.fspath(path)) if is_local(path) else _read_remote(path))


def _read_remote(path: epath.Path) -> bytes:
    name = printable(os.fspath(path))
    try:
        length = path.stat().length
        data = path.read_bytes() if 0 < length <= MAX_BYTES else b""
    except (OSError, ImportError, ValueError) as error:  # A back end that is not installed says which package it takes.
        raise InputError(f"{name}: {error}, expected a file that can be read: check the path") from error
    if not data:
        raise InputError(f"{name}: found {length} bytes, expected 1 to {MAX_BYTES}: get the picture again")
    return data


def write(path: epath.Path, data: bytes) -> None:
    """Writes a small file that is whole under its name, and on the disk, or is not there at all."""

    def attempt() -> None:
        if not is_local(path):
            # What is put into an object store appears when it is complete.
            path.write_bytes(data)
            return
        temporary, held = begin(path, Path.touch)
        try:
            with temporary.open("wb") as stream:
                put(stream, data)
                sync(stream)
            try:
                rename(temporary, path)
            except FileNotFoundError:
                # Taken for a leftover by another host, where locks are known to their own host alone.
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), os.fspath(path)) from None
        finally:
            os.close(held)
            temporary.unlink(missing_ok=True)

    retrying(attempt)


def appears(path: epath.Path) -> bool:
    """Waits until what is known to be there is seen: a host may remember for up to a minute that it was not."""
    deadline = time.monotonic() + _REMEMBERED
    while not (found := path.exists()) and time.monotonic() < deadline:
        time.sleep(_FIRST_PAUSE)
    return found


def append(stream: IO[bytes], data: bytes) -> None:
    """Adds to the end of a local file, all or nothing."""
    end = stream.tell()

    def attempt() -> None:
        stream.seek(end)
        stream.truncate()
        put(stream, data)
        stream.flush()

    try:
        retrying(attempt)
    except OSError:
        stream.seek(end)
        stream.truncate()
        raise


def publish(spool: Path, path: epath.Path) -> None:
    """Gives a finished local file or folder its final name and place; replaces what is there."""

    def attempt() -> None:
        if is_local(path):
            if spool.is_dir() and path.exists():
                # No folder can be replaced. Who is killed between the two finds it missing and makes it again.
                former = Path(path).with_name(temporary_name(path.name))
                os.replace(path, former)
                try:
                    rename(spool, path)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.replace(former, path)
                    raise
                shutil.rmtree(former, ignore_errors=True)
                return
            rename(spool, path)
            return
        with spool.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)

    retrying(attempt)


def spool_folder(folder: epath.Path) -> Path:
    """Where a file is written before `publish`: beside its final place, so that a rename will do, or where temporary
    files go."""
    return Path(folder) if is_local(folder) else Path(tempfile.gettempdir())


def temporary_name(name: str) -> str:
    """A name that no finished file has; `remove_leftovers` finds it again."""
    return f".{name}.{secrets.token_hex(4)}.tmp"


def begin(path: epath.Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """Makes a temporary file or folder for what will be `path`; the descriptor holds it as long as it is open.

    Another process that tidies up may take it for a leftover before it is held; then another one is made.

    Raises:
        OSError: it cannot be made.
    """
    for attempt in range(ATTEMPTS):
        temporary = spool_folder(path.parent) / temporary_name(path.name)
        make(temporary)
        try:
            return temporary, hold(temporary)
        except (BlockingIOError, FileNotFoundError):
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def hold(spool: Path) -> int:
    """Marks a temporary file or folder as being written by this process, as long as the descriptor is open.

    Raises:
        BlockingIOError, FileNotFoundError: another process removes it, or has done so.
    """
    descriptor = os.open(spool, os.O_RDONLY)
    try:
        try_lock(descriptor)
        os.stat(spool)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def remove_leftovers(folder: epath.Path, name: str) -> None:
    """Removes what killed processes have left of files whose names begin so: nothing that is finished, or that another
    process holds or may hold."""
    for path in spool_folder(folder).glob(f".{name}*.tmp"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if not try_lock(descriptor):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def digest(path: epath.Path) -> str:
    """The sha256 of a file."""

    def attempt() -> str:
        with path.open("rb") as stream:
            found = hashlib.sha256()
            while block := stream.read(1 << 22):
                found.update(block)
        return found.hexdigest()

    return retrying(attempt)


# What a disk is asked to do, with `rename`; everything that is written goes through them.


def put(stream: IO[bytes], data: Any) -> None:
    """Writes bytes to an open file."""
    stream.write(data)


def sync(stream: IO[bytes]) -> None:
    """Waits until an open file is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())
