"""The corpus of captioned drawings that `scripts/build_corpus.py` writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Shaped, UInt8

from sdipc_jax.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """Captioned pictures, one row each.

    Attributes:
        pictures: 64 px sRGB on white.
        caption: what is drawn, with its skin tone if it has one.
        key: the emoji's code points.
        base: those of the same emoji without a skin tone.
        tone: 0 without a skin tone, else 1 (light) to 5 (dark).
        style: the word for the artist's style.
        vendor: who drew it; two styles of one vendor are drawings of each other.
        split: `train`; `cells`, a known thing never seen by this vendor; `unseen`, a thing never seen; `style`, a
            style never seen.
        manifest: package versions, licences, counts and the digest of the contents.
    """

    pictures: UInt8[np.ndarray, "N 64 64 3"]
    caption: Shaped[np.ndarray, " N"]
    key: Shaped[np.ndarray, " N"]
    base: Shaped[np.ndarray, " N"]
    tone: Shaped[np.ndarray, " N"]
    style: Shaped[np.ndarray, " N"]
    vendor: Shaped[np.ndarray, " N"]
    split: Shaped[np.ndarray, " N"]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pictures)

    def where(self, mask: np.ndarray | slice) -> Self:
        """The rows that a mask, an index array or a slice picks."""
        columns = {name: getattr(self, name)[mask] for name in COLUMNS}
        return type(self)(**columns, manifest=self.manifest)

    @property
    def known(self) -> Self:
        """All but those in a style never seen: what a picture may be taken for is looked for among their captions."""
        return self.where(self.split != "style")

    def held_out(self, split: str) -> Self:
        """Those of a split whose captions are among the known ones."""
        return self.where((self.split == split) & np.isin(self.caption, self.known.caption))


COLUMNS = ("pictures", "caption", "key", "base", "tone", "style", "vendor", "split")


def load_corpus(path: str | Path = "build/corpus.npz") -> Corpus:
    """Reads the corpus.

    Raises:
        InputError: it is not there or not whole.
    """
    try:
        with np.load(path) as file:
            return Corpus(**{name: file[name] for name in COLUMNS}, manifest=json.loads(str(file["manifest"])))
    except FileNotFoundError:
        raise InputError(f"{path}: no corpus there: run `python scripts/build_corpus.py`") from None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a whole corpus ({error}): delete it and run scripts/build_corpus.py") from None
