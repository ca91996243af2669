"""Fitted maps in the user's cache folder, so that captions go through a pair of checkpoints once."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load, save

from sdipc_jax.prompts.calibration import Calibration
from sdipc_jax.prompts.kept import Kept, digest_of_arrays
from sdipc_jax.prompts.ridge import RidgeMap
from sdipc_jax.records import Record

# Changes with what is written and how it is computed: older files are not read.
_VERSION = 1
_ARRAYS = ("matrix", "intercept", "length", "centre", "axes", "deviations")


class Store(Kept):
    """A file for each pair of checkpoints and set of captions."""

    def __init__(self, decisive: Record) -> None:
        """
        Args:
            decisive: all that the map follows from.
        """
        super().__init__("calibrations", decisive | {"version": _VERSION}, "the calibration is")

    def read(self) -> Calibration | None:
        """The calibration that is kept, or None: nothing, or nothing whole."""
        data = self.read_bytes()
        try:
            return None if data is None else _decoded(data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None

    def write(self, calibration: Calibration) -> None:
        """Keeps a calibration, or adds a note that it cannot be."""
        self.write_bytes(_encoded(calibration))


def _encoded(calibration: Calibration) -> bytes:
    arrays = {name: np.ascontiguousarray(getattr(calibration.map, name), np.float32) for name in _ARRAYS}
    facts = {name: value for name, value in asdict(calibration).items() if name != "map"}
    facts |= {"rank": calibration.map.rank, "sha256": digest_of_arrays(arrays)}
    return save(arrays, {"calibration": json.dumps(facts)})


def _decoded(data: bytes) -> Calibration:
    """Raises ValueError, KeyError or TypeError where the file is damaged."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts: dict[str, Any] = json.loads(header["__metadata__"]["calibration"])
    arrays = load(data)
    if facts.pop("sha256") != digest_of_arrays(arrays):
        raise ValueError("the arrays are not what was written")
    fitted = RidgeMap(**{name: arrays[name] for name in _ARRAYS}, rank=facts.pop("rank"))
    return Calibration(fitted, **facts | {name: tuple(facts[name]) for name in ("r2", "widths")})
