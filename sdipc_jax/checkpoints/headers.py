"""What a safetensors file says of itself, and the values of its tensors one by one."""

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from sdipc_jax.errors import InputError, one_line, printable, shortened

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Hundreds of times what a Stable Diffusion checkpoint needs: parsing a hostile header must not take long.
_LONGEST_HEADER = 8_000_000
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file.

    Attributes:
        transposed: what is wanted is the transpose of the matrix that is stored.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    transposed: bool = False

    def third(self, index: int) -> "Tensor":
        """One of three equal parts along the first axis, as if it were a tensor of its own."""
        first, *rest = self.shape or (0,)
        part = replace(self, shape=(first // 3, *rest))
        size = math.prod(part.shape) * np.dtype(_DTYPES.get(self.dtype, np.uint8)).itemsize
        # What cannot be divided keeps its shape, and so fits nowhere.
        return self if first % 3 else replace(part, offset=self.offset + index * size)

    def transpose(self) -> "Tensor":
        """The matrix turned around, as if it were stored so."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def reshaped(self, shape: tuple[int, ...]) -> "Tensor":
        """With axes of length 1 at its end added or left away, if nothing else differs."""
        shorter, longer = sorted((self.shape, shape), key=len)
        fits = longer[: len(shorter)] == shorter and set(longer[len(shorter) :]) <= {1} and not self.transposed
        return replace(self, shape=shape) if fits else self

    def read(self) -> np.ndarray:
        """The tensor's values.

        Raises:
            InputError: not a floating-point tensor, or not all of its values are finite.
        """
        if self.dtype not in _DTYPES:
            raise InputError(
                f"{self.file}: {self.name} has dtype {self.dtype}, expected one of {', '.join(_DTYPES)}: fetch it again"
            )
        shape = self.shape[::-1] if self.transposed else self.shape
        array = np.fromfile(self.file, _DTYPES[self.dtype], math.prod(shape), offset=self.offset).reshape(shape)
        if not all_finite(array):
            raise InputError(f"{self.file}: {self.name} holds NaN or infinity: the file is damaged, fetch it again")
        return array.T if self.transposed else array


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, for an array in one piece.

    By its bits, which is many times quicker for 16 bits: read as integers, NaN and infinity are the largest of a sign.
    """
    size = array.dtype.itemsize
    for infinity, kind in ((np.inf, "i"), (-np.inf, "u")):
        limit = np.array(infinity, array.dtype).view(f"{kind}{size}")
        if array.size and array.view(f"{kind}{size}").max() >= limit:
            return False
    return True


def read_header(file: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file, without their values.

    Raises:
        InputError: the file is not whole or not safetensors.
    """
    check_pointer(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        # The library checks what a hostile header could do: overlaps, holes, sizes.
        with safetensors.safe_open(file, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = shortened(one_line(error))
        raise InputError(f"{file}: found no whole safetensors file ({reason}), expected one: fetch it again") from None
    for name, entry in header.items():
        if name != "__metadata__":
            offset = 8 + length + entry["data_offsets"][0]
            yield Tensor(file, name, entry["dtype"], tuple(entry["shape"]), offset)


def check_pointer(file: Path) -> None:
    """Refuses what `git clone` leaves in the place of a large file where git-lfs is not installed.

    Raises:
        InputError: the file is such a pointer.
    """
    with suppress(OSError), file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            folder = printable(file.parent)
            raise InputError(
                f"{printable(file)}: found a git-lfs pointer, expected the file that it points to: "
                f"run `git -C {shlex.quote(folder)} lfs pull`"
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is in its header twice")
        values[name] = value
    return values


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a whole safetensors file carries beside its tensors."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        return opened.metadata() or {}
