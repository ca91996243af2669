"""The files that a command is given: pictures, and noise to start from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32
from safetensors import SafetensorError, safe_open

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.datasets.folder import Folder
from sdipc_jax.datasets.rules import told
from sdipc_jax.errors import InputError, printable, shortened
from sdipc_jax.pictures.outputs import Subject
from sdipc_jax.pictures.preprocessing import preprocess, seen
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.pictures.sheets import mark_middle, thumbnail
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.records import Record

# A picture of which more than this share is not seen gets a note, and a mark on the sheet.
NOTED_LOSS = 0.2
# As safetensors and NumPy call them.
_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Input:
    """A picture as it is needed from here on: for the vision tower, for the sheet, for the manifest."""

    subject: Subject
    pixels: Float32[np.ndarray, "S S 3"]


def expand(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files that are named, for a folder all pictures below it in the order of their names; and notes.

    Raises:
        InputError: a folder cannot be read, or holds no picture.
    """
    files: list[Path] = []
    notes: list[str] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        passed = Counter[str]()
        found = [path / name for name, _ in Folder(epath.Path(path), captions=False).pictures(passed)]
        passed_over = [f"{printable(path)}: {note}" for note in told(passed)]
        if not found:
            others = "".join(f"; {note}" for note in passed_over)
            raise InputError(f"{printable(path)}: found a folder without pictures{others}, expected one: name another")
        files += found
        notes += passed_over
    return files, notes


def read_inputs(config: Config, paths: Sequence[Path]) -> tuple[list[Input], list[Record]]:
    """The pictures that can be read, and a record of each that cannot.

    Raises:
        InputError: none can be read.
    """
    inputs, failures = [], []
    preprocessing = config.vision_side.preprocessing
    for path in paths:
        try:
            picture = read_picture(path)
        except InputError as error:
            failures.append({"input": str(path), "error": str(error)})
            continue
        notes, shown = [*picture.notes], thumbnail(picture.pixels)
        height, width = picture.pixels.shape[:2]
        rows, columns = seen(height, width, preprocessing)
        if rows * columns < 1 - NOTED_LOSS:
            notes.append(f"{1 - rows * columns:.0%} of it lie outside of the middle that is used: --fit pad uses all")
            shown = mark_middle(shown, rows, columns)
        record = {"input": str(path), "input_sha256": picture.sha256} | ({"notes": notes} if notes else {})
        inputs.append(Input(Subject(path.stem, record, shown), preprocess(picture.pixels, preprocessing)))
    if failures and not inputs:
        others = f" (and none of the other {len(failures) - 1} can be used)" if len(failures) > 1 else ""
        raise InputError(failures[0]["error"] + others)
    return inputs, failures


def vectors_of(converter: Converter, inputs: Sequence[Input]) -> Float[Array, "N *places D_text"]:
    """The inputs' vectors, with a note on those that the checkpoint does not know."""
    names = [each.subject.record["input"] for each in inputs]
    return converter.vectors([each.pixels for each in inputs], names)


def each_path(inputs: Sequence[Input]) -> list[Path]:
    """The files of inputs."""
    return [Path(each.subject.record["input"]) for each in inputs]


def read_latents(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of unit variance.

    Raises:
        InputError: no such file, or it does not hold float32 `latents` of this shape, all finite.
    """
    name = printable(path)
    expected = f"expected 'latents' of float32 {shape}, one row a picture"
    try:
        with safe_open(path, "np") as file:
            tensor = file.get_slice("latents") if "latents" in file.keys() else None  # noqa: SIM118
            kind = None if tensor is None else (tensor.get_dtype(), tuple(tensor.get_shape()))
            # NumPy does not have all the types that a file can.
            found = file.get_tensor("latents") if kind == ("F32", shape) else None
    except (OSError, SafetensorError) as error:
        reason = shortened(str(error))
        raise InputError(f"{name}: no readable safetensors file ({reason}), {expected}: check the path") from None
    if found is None:
        what = "no tensor 'latents'" if kind is None else f"latents of {_DTYPES.get(kind[0], kind[0])} {kind[1]}"
        raise InputError(f"{name}: found {what}, {expected}: save them anew, or change --num-images or the size")
    if not np.isfinite(found).all():
        raise InputError(f"{name}: latents hold NaN or infinity, expected noise of unit variance: draw them anew")
    return found
