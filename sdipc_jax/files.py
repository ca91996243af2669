"""Files: written whole or not at all, nowhere that they would not do, and lists and settings read from them."""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sdipc_jax.errors import InputError, one_line, printable

_Settings = TypeVar("_Settings")

_TEMPORARY = ".sdipc-"
# What file systems answer that know no fsync of a folder, as some in user space and over networks.
_NOT_FOR_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is whole under its name, and on the disk, or is not there at all.

    Raises:
        InputError: it cannot be written; the cause is the OSError.
    """
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}.tmp"
    try:
        try:
            # Not `tempfile`: its files are private, these get the rights that the user's other files get.
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{printable(path)}: {error.strerror} while writing {len(data)} bytes, expected a folder with room for "
            "them: free some space, check the folder's rights, or choose another"
        ) from error


def new_folder(parent: Path, name: str) -> Path:
    """The first of `name-001`, `name-002` and so on that is not there yet; it is not made."""
    number = 1
    while os.path.lexists(parent / f"{name}-{number:03d}"):
        number += 1
    return parent / f"{name}-{number:03d}"


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left of `write_atomically`, from a folder that no other one writes to."""
    for path in folder.glob(f"{_TEMPORARY}*.tmp"):
        path.unlink(missing_ok=True)


def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Renames, and waits until the new name is on the disk, where the file system has such a wait for folders."""
    os.replace(source, target)
    folder = os.open(os.path.dirname(os.path.abspath(target)), os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(folder)


def check_result(path: Path, option: str, overwrite: bool) -> None:
    """Refuses a result's place that cannot be written, or where there is one already.

    Args:
        option: what people type to choose another.

    Raises:
        InputError: with the reason.
    """
    check_writable(path.parent)
    if path.is_dir():
        raise InputError(f"{printable(path)}: found a folder, expected a file: choose another {option}")
    if path.exists() and not overwrite:
        raise InputError(f"{printable(path)} is there already: choose another {option} or --overwrite")


def check_writable(folder: Path) -> None:
    """Refuses a folder that is none, or that cannot be made or written. Leaves nothing behind.

    Raises:
        InputError: with the reason.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        # Trying is the only sure test: rights alone do not tell, least of all to an administrator.
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder, prefix=".sdipc-").cleanup()
    except OSError as error:
        raise InputError(
            f"{printable(folder)}: cannot write there ({error.strerror}), expected a folder to write to: choose another"
        ) from None
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """The lines of a text file without the space around them; empty ones and those that were there are left out.

    Args:
        what: errors say was expected, one a line.

    Raises:
        InputError: it cannot be read, or is no UTF-8.
    """
    name = printable(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(
            f"{name}: {error.strerror}, expected a text file of {what}, one a line: check the path"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{name}: found no UTF-8 text, expected {what}, one a line: save it as UTF-8") from None
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def read_yaml(path: Path, file: str, content: str) -> dict[str, Any]:
    """The mapping in a file of settings.

    Args:
        file, content: what errors say was expected: the file, and in it.

    Raises:
        InputError: it cannot be read, or is no YAML mapping.
    """
    # Few commands read any, and help and refusals come before.
    import yaml

    name = printable(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}, expected {file}: check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise InputError(f"{name}: found no readable YAML ({reason}), expected {content}: correct it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{name}: found no mapping, expected `name: value` on each line: correct it")
    return values


def read_settings(path: Path, kind: Callable[..., _Settings], what: str) -> _Settings:
    """Settings from a file.

    Args:
        what: whose they are, such as "a job".

    Raises:
        InputError: the file cannot be read, is no YAML mapping, or holds what is no setting of this kind.
    """
    values = read_yaml(path, f"{what}'s file", f"{what}'s settings")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None
