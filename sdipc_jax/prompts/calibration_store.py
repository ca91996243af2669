"""Fitted maps in the user's cache folder, so that captions go through a pair of checkpoints once."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load, save

from sdipc_jax.compilation import private_folder, writable_by_others
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.prompts.calibration import Calibration
from sdipc_jax.prompts.ridge import RidgeMap
from sdipc_jax.records import Record, digest_of

# Changes with what is written and how it is computed: older files are not read.
_VERSION = 1
_ARRAYS = ("matrix", "intercept", "length", "centre", "axes", "deviations")


class Store:
    """A file for each pair of checkpoints and set of captions.

    Attributes:
        notes: says so where nothing can be kept.
    """

    def __init__(self, decisive: Record) -> None:
        """
        Args:
            decisive: all that the map follows from.
        """
        self.path: Path | None = None
        self.notes: tuple[str, ...] = ()
        folder = private_folder("calibrations")
        if folder is None or not os.access(folder, os.W_OK):
            self.notes = ("the user's cache folder cannot be written: the calibration is not kept",)
        elif writable_by_others(folder):
            self.notes = (f"others can write to {printable(folder)}: the calibration is not kept, chmod 700 it",)
        else:
            self.path = folder / f"{digest_of(decisive | {'version': _VERSION})}.safetensors"

    def read(self) -> Calibration | None:
        """The calibration that is kept, or None: nothing, or nothing whole."""
        try:
            return None if self.path is None else _decoded(self.path.read_bytes())
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None

    def write(self, calibration: Calibration) -> None:
        """Keeps a calibration, or adds a note that it cannot be."""
        if self.path is not None:
            try:
                write_atomically(self.path, _encoded(calibration))
            except InputError as error:
                self.notes = (f"{error}: the calibration is not kept",)


def _encoded(calibration: Calibration) -> bytes:
    arrays = {name: np.ascontiguousarray(getattr(calibration.map, name), np.float32) for name in _ARRAYS}
    facts = {name: value for name, value in asdict(calibration).items() if name != "map"}
    facts |= {"rank": calibration.map.rank, "sha256": _digest(arrays)}
    return save(arrays, {"calibration": json.dumps(facts)})


def _decoded(data: bytes) -> Calibration:
    """Raises ValueError, KeyError or TypeError where the file is damaged."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts: dict[str, Any] = json.loads(header["__metadata__"]["calibration"])
    arrays = load(data)
    if facts.pop("sha256") != _digest(arrays):
        raise ValueError("the arrays are not what was written")
    fitted = RidgeMap(**{name: arrays[name] for name in _ARRAYS}, rank=facts.pop("rank"))
    return Calibration(fitted, **facts | {name: tuple(facts[name]) for name in ("r2", "widths")})


def _digest(arrays: dict[str, np.ndarray]) -> str:
    return digest_of({name: [array.shape, array.tobytes()] for name, array in arrays.items()})
