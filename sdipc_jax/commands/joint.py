"""What `words` and `search` share: files to vectors of the joint space."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sdipc_jax.checkpoints.bundle import with_fit
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.commands.settings import JointSettings
from sdipc_jax.errors import InputError
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.reading import decode_picture, read_bytes
from sdipc_jax.prompts.joint import JointSpace
from sdipc_jax.records import Record, Report

# Pictures in memory at once.
_AT_ONCE = 64

Vector = Float[np.ndarray, " D_joint"]


@dataclass(frozen=True)
class Encoded:
    """Pictures that could be used, with a vector each, and a record of each that could not."""

    records: list[Record]
    vectors: Float[np.ndarray, "N D_joint"]
    failures: list[Record]


def joint_space(settings: JointSettings) -> JointSpace:
    """The CLIP that settings ask for."""
    return JointSpace(with_fit(configure(settings), settings.fit), settings.tuned)


def encode_files(
    space: JointSpace, paths: Sequence[Path], report: Report = lambda _: None, known: Mapping[str, Vector] | None = None
) -> Encoded:
    """The vectors of picture files, a few of which are in memory at once.

    Args:
        known: vectors by the files' sha256.

    Raises:
        InputError: none can be used.
    """
    known, preprocessing = known or {}, space.config.vision_side.preprocessing
    records: list[Record] = []
    vectors: list[Vector] = []
    failures: list[Record] = []
    for first in range(0, len(paths), _AT_ONCE):
        places, pixels = [], []
        for path in paths[first : first + _AT_ONCE]:
            try:
                data = read_bytes(path)
                sha256 = hashlib.sha256(data).hexdigest()
                record: Record = {"input": str(path), "input_sha256": sha256}
                if sha256 in known:
                    vectors.append(known[sha256])
                else:
                    picture = decode_picture(data, path)
                    record |= {"notes": [*picture.notes]} if picture.notes else {}
                    pixels.append(preprocess(picture.pixels, preprocessing))
                    places.append(len(vectors))
                    vectors.append(np.zeros(0))
                records.append(record)
            except InputError as error:
                failures.append({"input": str(path), "error": str(error)})
        if pixels:
            for place, vector in zip(places, space.pictures(pixels), strict=True):
                vectors[place] = vector
        report(min(1.0, (first + _AT_ONCE) / len(paths)))
    if not vectors:
        others = f" (and none of the other {len(failures) - 1} can be used)" if len(failures) > 1 else ""
        raise InputError(failures[0]["error"] + others)
    return Encoded(records, np.stack(vectors), failures)


def table(rows: Sequence[tuple[str, float]]) -> str:
    """Names and numbers in a line.

    >>> table([("cat", 0.25), ("red hat", -0.5)])
    'cat 0.250, red hat -0.500'
    """
    return ", ".join(f"{name} {value:.3f}" for name, value in rows)
