"""The files that a command is given: pictures, and noise to start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.outputs import Subject
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.pictures.sheets import thumbnail
from sdipc_jax.records import Record


@dataclass(frozen=True)
class Input:
    """A picture as it is needed from here on: for the vision tower, for the sheet, for the manifest."""

    subject: Subject
    pixels: Float32[np.ndarray, "S S 3"]


def read_inputs(config: Config, paths: Sequence[Path]) -> tuple[list[Input], list[Record]]:
    """The pictures that can be read, and a record of each that cannot.

    Raises:
        InputError: none can be read.
    """
    inputs, failures = [], []
    for path in paths:
        try:
            picture = read_picture(path)
        except InputError as error:
            failures.append({"input": str(path), "error": str(error)})
            continue
        notes = {"notes": list(picture.notes)} if picture.notes else {}
        record = {"input": str(path), "input_sha256": picture.sha256} | notes
        subject = Subject(path.stem, record, thumbnail(picture.pixels))
        inputs.append(Input(subject, preprocess(picture.pixels, config.vision_side.preprocessing)))
    if failures and not inputs:
        others = f" (and none of the other {len(failures) - 1} can be used)" if len(failures) > 1 else ""
        raise InputError(failures[0]["error"] + others)
    return inputs, failures


def read_latents(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of unit variance.

    Raises:
        InputError: no such file, or it does not hold float32 `latents` of this shape, all finite.
    """
    name = printable(path)
    expected = f"expected 'latents' of float32 {shape}, one row a picture"
    try:
        found = load_file(path).get("latents")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{name}: no readable safetensors file ({error}), {expected}: check the path") from None
    if found is None or found.dtype != np.float32 or found.shape != shape:
        what = "no tensor 'latents'" if found is None else f"latents of {found.dtype} {found.shape}"
        raise InputError(f"{name}: found {what}, {expected}: save them anew, or change --num-images or the size")
    if not np.isfinite(found).all():
        raise InputError(f"{name}: latents hold NaN or infinity, expected noise of unit variance: draw them anew")
    return found
