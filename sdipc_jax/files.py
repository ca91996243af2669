"""Files that are whole or not there."""

import os
import secrets
from pathlib import Path

from sdipc_jax.errors import InputError
from sdipc_jax.images import printable

_TEMPORARY = ".sdipc-"


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
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{printable(path)}: {error.strerror} while writing {len(data)} bytes, expected a folder with room for "
            "them: free some space, check the folder's rights, or choose another"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left of `write_atomically`, from a folder that no other one writes to."""
    for path in folder.glob(f"{_TEMPORARY}*.tmp"):
        path.unlink(missing_ok=True)
