"""Whether a picture is like what a checkpoint knows: its joint vector's cosine with the nearest of the captions'."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.tensors import to_safetensors
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.prompts.ridge import unit
from sdipc_jax.records import Counted

# Beside the weights of a CLIP whose makers have measured it.
FILE = "captions.safetensors"
_TENSOR, _LEAST, _MEASURED = "captions", "least_cosine", "measured_by"


@dataclass(frozen=True)
class Familiar:
    """What a checkpoint was trained with, as its CLIP sees it.

    Attributes:
        captions: vectors of the captions, of length 1.
        least: pictures whose nearest caption has a smaller cosine are unlike what the checkpoint knows.
        measured_by: the command that has found `least`.
    """

    captions: Float32[np.ndarray, "N D_joint"]
    least: float
    measured_by: str

    @classmethod
    def of(cls, config: Config) -> Self | None:
        """That of a checkpoint's CLIP; None where nobody has measured it.

        Raises:
            InputError: the file is damaged.
        """
        file = Path(config.vision_side.folder, FILE)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "np") as stored:
                facts = stored.metadata()
                return cls(_of_length_1(stored.get_tensor(_TENSOR)), float(facts[_LEAST]), facts[_MEASURED])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            raise InputError(
                f"{printable(file)}: not readable, expected the captions' vectors: fetch it again, or delete it"
            ) from None

    def nearest(self, vectors: Float[np.ndarray, "M D_joint"]) -> Float[np.ndarray, " M"]:
        """The cosine of each picture's joint vector with that of the nearest caption."""
        return (unit(vectors) @ self.captions.T).max(axis=1)

    def notes(self, names: Sequence[str], vectors: Float[np.ndarray, "M D_joint"]) -> tuple[str, ...]:
        """What a person should know of pictures that are unlike the others, a line."""
        note = (
            f"unlike what this checkpoint knows (cosine with the nearest of its captions below {self.least:g}), so "
            "that results may show something else"
        )
        counted = Counted()
        for name, cosine in zip(names, self.nearest(vectors), strict=True):
            counted.add(printable(name), [note] if cosine < self.least else [])
        return tuple(counted.lines())

    def write(self, folder: Path) -> None:
        """Puts it beside a CLIP's weights, a byte a number: only directions count."""
        largest = np.abs(self.captions).max(axis=1, keepdims=True)
        bytes_ = np.round(127 * self.captions / largest).astype(np.int8)
        facts = {_LEAST: f"{self.least:g}", _MEASURED: self.measured_by}
        write_atomically(folder / FILE, to_safetensors({_TENSOR: bytes_}, facts))


def _of_length_1(stored: np.ndarray) -> Float32[np.ndarray, "N D_joint"]:
    return unit(stored.astype(np.float32)).astype(np.float32)
