"""CLIP's two towers alone: pictures and texts to vectors of the joint space, with what is kept between runs."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
from jaxtyping import Float, Float32
from safetensors.numpy import load, save

from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import load_weights
from sdipc_jax.checkpoints.text_tower import TextTower, load_text_tower
from sdipc_jax.prompts.calibration import caption_vectors, picture_vectors
from sdipc_jax.prompts.kept import Kept, digest_of_arrays
from sdipc_jax.prompts.ridge import unit
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.prompts.words import TEMPLATES, Bank, encode_words
from sdipc_jax.records import Record

# Changes with what is written and how it is computed: older files are not read.
_VERSION = 1
# What neither a picture nor a text goes through here.
_NOT_CLIP = (
    "unet/",
    "vae/",
    "scheduler/",
    "safety_checker/",
    "feature_extractor/",
    "text_encoder",
    "lora/",
    "embedding/",
)
# Pictures encoded at once, always: one program, and the same vectors.
_AT_ONCE = 8


class JointSpace:
    """A checkpoint's CLIP; each tower is read when it is first needed.

    Attributes:
        files: digests of what vectors follow from.
        notes: what could not be kept.
    """

    def __init__(self, config: Config, tuned: Path | None = None) -> None:
        self.config, self.tuned = config, tuned
        self.files = digests(config, tuned, left_out=_NOT_CLIP)
        self.notes: tuple[str, ...] = ()

    @cached_property
    def bundle(self) -> Bundle:
        return load_weights(self.config, self.tuned, only=("clip",))

    @cached_property
    def tower(self) -> TextTower:
        return load_text_tower(self.config)

    def pictures(self, pixels: Sequence[Float32[np.ndarray, "S S 3"]]) -> Float[np.ndarray, "N D_joint"]:
        """The vectors of preprocessed pictures, of length 1."""
        features = in_batches(lambda rows: encode_images(self.bundle, rows), np.stack(pixels), size=_AT_ONCE)
        return unit(picture_vectors(self.bundle, features))

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D_joint"]:
        """The vectors of texts as they are, of length 1."""
        return unit(caption_vectors(self.tower, texts))

    def bank(self, words: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Bank:
        """The vectors of words, from the cache or encoded."""
        clip = {name: digest for name, digest in self.files.items() if name != "tuned"}
        kept = KeptVectors("words", {"clip": clip, "words": list(words), "templates": list(templates)}, "the words are")
        found = kept.read()
        if found is not None and found[0] == list(words):
            return Bank(tuple(words), unit(found[1]))
        bank = encode_words(self.tower, words, templates)
        kept.write(list(words), bank.vectors)
        self.notes += kept.notes
        return bank

    def kept_pictures(self, decisive: Record) -> "KeptVectors":
        """Where vectors of a folder's pictures are kept, by their sha256.

        Args:
            decisive: what they follow from besides the CLIP.
        """
        fit = self.config.vision_side.preprocessing.fit
        return KeptVectors(
            "pictures",
            {"clip": self.files, "dtype": self.config.dtype, "fit": fit} | decisive,
            "the pictures' vectors are",
        )


class KeptVectors(Kept):
    """Names and their vectors, in a file of the user's cache folder."""

    def __init__(self, folder: str, decisive: Record, what: str) -> None:
        super().__init__(folder, decisive | {"version": _VERSION}, what)

    def read(self) -> tuple[list[str], Float32[np.ndarray, "N D_joint"]] | None:
        """What is kept, or None: nothing, or nothing whole."""
        data = self.read_bytes()
        if data is None:
            return None
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            names, arrays = json.loads(header["names"]), load(data)
            whole = header["sha256"] == digest_of_arrays(arrays) and len(names) == len(arrays["vectors"])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None
        return (names, arrays["vectors"]) if whole else None

    def write(self, names: Sequence[str], vectors: Float[np.ndarray, "N D_joint"]) -> None:
        """Keeps them, or adds a note that they cannot be."""
        arrays = {"vectors": np.ascontiguousarray(vectors, np.float32)}
        self.write_bytes(save(arrays, {"names": json.dumps(list(names)), "sha256": digest_of_arrays(arrays)}))
