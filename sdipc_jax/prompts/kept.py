"""Files of one's own in the user's cache folder: what took long to compute, by all that it follows from."""

import os
from pathlib import Path

import numpy as np

from sdipc_jax.compilation import private_folder, writable_by_others
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.records import Record, digest_of


class Kept:
    """One such file.

    Attributes:
        notes: says so where nothing can be kept.
    """

    def __init__(self, folder: str, decisive: Record, what: str) -> None:
        """
        Args:
            folder: below the user's cache folder.
            decisive: all that the content follows from.
            what: what notes call it, such as "the calibration is".
        """
        self.what = what
        self.path: Path | None = None
        self.notes: tuple[str, ...] = ()
        place = private_folder(folder)
        if place is None or not os.access(place, os.W_OK):
            self.notes = (f"the user's cache folder cannot be written: {what} not kept",)
        elif writable_by_others(place):
            self.notes = (f"others can write to {printable(place)}: {what} not kept, chmod 700 it",)
        else:
            self.path = place / f"{digest_of(decisive)}.safetensors"

    def read_bytes(self) -> bytes | None:
        """What is kept, or None."""
        try:
            return None if self.path is None else self.path.read_bytes()
        except OSError:
            return None

    def write_bytes(self, data: bytes) -> None:
        """Keeps it, or adds a note that it cannot be."""
        if self.path is not None:
            try:
                write_atomically(self.path, data)
            except InputError as error:
                self.notes = (f"{error}: {self.what} not kept",)


def digest_of_arrays(arrays: dict[str, np.ndarray]) -> str:
    """Of shapes and contents, by which a damaged file is told."""
    return digest_of({name: [array.shape, array.tobytes()] for name, array in arrays.items()})
