"""What readers of shards share."""

import hashlib
import os
from collections.abc import Sequence

from etils import epath

from sdipc_jax.errors import InputError


def digest_of_files(paths: Sequence[epath.Path]) -> str:
    """By names and sizes: to read them all takes as long as the job's own reading."""
    lines = "".join(f"{path.name} {path.stat().length}\n" for path in paths)
    return hashlib.sha256(os.fsencode(lines)).hexdigest()


def only_damaged(damaged: Sequence[str], rows: int) -> None:
    """Refuses a data set of which nothing but damaged files' marks are left.

    Args:
        rows: with one for each damaged file.

    Raises:
        InputError: there is no other row.
    """
    if damaged and rows == len(damaged):
        raise InputError(f"{'; '.join(damaged[:3])}, expected a whole file: get it again")
