"""Pictures' features at the speed of the vision tower: files are read beside it, and what is done is kept."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, UInt8

from sdipc_jax.batches import pad
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.parallel import AXIS, make_mesh, on_each_device, place, replicate
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Report, digest_of

Pixels = UInt8[np.ndarray, "H W 3"]
Read = TypeVar("Read")

# Pictures that a device encodes at once, and what is kept in one file.
_AT_ONCE, _KEPT = 32, 4096
# Batches that are read ahead.
_AHEAD = 3


def read_ahead(paths: Sequence[Path], prepare: Callable[[Pixels], Read], size: int) -> Iterator[list[Read]]:
    """Pictures in batches, the next ones read by other threads meanwhile; decoding leaves Python to them.

    Raises:
        InputError: one cannot be read.
    """

    def read(path: Path) -> Read:
        try:
            return prepare(read_picture(path).pixels)
        except InputError as error:
            raise InputError(f"{printable(path)}: {str(error).removeprefix(f'{printable(path)}: ')}") from None

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        waiting: deque[list[Future[Read]]] = deque()
        for first in range(0, len(paths), size):
            waiting.append([pool.submit(read, path) for path in paths[first : first + size]])
            if len(waiting) > _AHEAD:
                yield [each.result() for each in waiting.popleft()]
        for batch in waiting:
            yield [each.result() for each in batch]


def encode_files(
    bundle: Bundle,
    paths: Sequence[Path],
    *,
    keep: Path | None = None,
    identity: Any = None,
    report: Report | None = None,
) -> Float32[np.ndarray, "N D_image"]:
    """The class token of each picture, by all devices of this process.

    Args:
        keep: a folder for what is done, so that a run that was stopped goes on.
        identity: of the checkpoint; what is kept is found again by it, and by the files' names and sizes.
        report: told how much is done.
    """
    mesh = make_mesh(None, jax.local_devices())
    bundle = replicate(mesh, bundle)
    prepare = partial(preprocess, settings=bundle.config.vision_side.preprocessing)
    size = _AT_ONCE * mesh.size
    found = []
    for first in range(0, len(paths), _KEPT):
        part = paths[first : first + _KEPT]
        place_of = None
        if keep is not None:
            # Folders may be moved, a file's contents hardly change under its name and size.
            named = digest_of([identity, [[path.parent.name, path.name, path.stat().st_size] for path in part]])
            place_of = keep / f"features-{named[:16]}.npy"
        if place_of is not None and place_of.is_file():
            found.append(np.load(place_of))
        else:
            batches = read_ahead(part, prepare, size)
            done = [_encoded(mesh, bundle, np.stack(batch), size) for batch in batches]
            found.append(np.concatenate(done))
            if place_of is not None:
                _keep(place_of, found[-1])
        if report is not None:
            report(min(1.0, (first + len(part)) / len(paths)))
    return np.concatenate(found)


def _encoded(mesh: Mesh, bundle: Bundle, pixels: np.ndarray, size: int) -> Float32[np.ndarray, "N D_image"]:
    # A batch that is not full is filled up, so that it runs the program that is there.
    return np.asarray(_encode(mesh, bundle, place(mesh, pad(pixels, size))))[: len(pixels)]


@partial(jax.jit, static_argnums=0)
def _encode(mesh: Mesh, bundle: Bundle, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N D_image"]:
    return on_each_device(encode_images, mesh, (P(), P(AXIS)), P(AXIS))(bundle, pixels)


def _keep(path: Path, features: Float32[np.ndarray, "N D_image"]) -> None:
    stream = io.BytesIO()
    np.save(stream, features)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, stream.getvalue())
