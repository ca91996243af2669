"""From which distance on a picture is unlike what the checkpoint that ships knows: a table for its card, and a file.

    python scripts/measure_familiar.py --photos FOLDER

Each picture's vector in CLIP's joint space is compared with those of all captions of the training drawings; the cosine
with the nearest is its familiarity. The least that counts as known is what all but a share of the held-out drawings of
known things reach (`--noted`). How many other drawings, and photographs, stay below it is told beside. The captions'
vectors and that least cosine are written to clip/captions.safetensors, where `sdipc vary` and its like look for them.
Photographs count whole, and in ten square pieces each, of 0.3 to 0.8 of the shorter side.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

import sdipc_jax as sdipc
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.prompts.familiar import Familiar
from sdipc_jax.prompts.joint import JointSpace

_PIECES = 10
_NAMES = {
    "cells": "held-out drawings of known things",
    "unseen": "drawings of things never seen",
    "style": "drawings in a style never seen",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default="build/corpus.npz")
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--noted", type=float, default=0.1, help="the share of known things that gets a note")
    asked = parser.parse_args()
    corpus, config = load_corpus(asked.corpus), sdipc.load("embedded").config
    space, settings = JointSpace(config), config.vision_side.preprocessing
    captions = space.texts([str(each) for each in np.unique(corpus.caption[corpus.split == "train"])])
    # Written as rounded to a byte, and measured as written.
    folder = Path(config.vision_side.folder)
    Familiar(captions.astype(np.float32), 0.0, "").write(folder)
    familiar = Familiar.of(config)
    assert familiar is not None

    def nearest(pictures: list[UInt8[np.ndarray, "H W 3"]]) -> np.ndarray:
        return familiar.nearest(space.pictures([preprocess(each, settings) for each in pictures]))

    photos = [read_picture(path).pixels for path in sorted(asked.photos.iterdir())]
    draw = np.random.default_rng(0)
    found = {name: nearest([*corpus.pictures[corpus.split == split]]) for split, name in _NAMES.items()}
    found["photographs"] = nearest(photos)
    found["pieces of photographs"] = nearest([piece for photo in photos for piece in pieces(photo, draw)])
    least = round(float(np.quantile(found[_NAMES["cells"]], asked.noted)), 3)
    Familiar(familiar.captions, least, f"scripts/measure_familiar.py --noted {asked.noted:g}").write(folder)
    print(f"Cosine with the nearest of {len(captions)} captions; below {least} there is a note.\n")
    print("| | pictures | 5% | median | 95% | noted |\n|---|---|---|---|---|---|")
    for name, cosines in found.items():
        shown = " | ".join(f"{each:.3f}" for each in np.quantile(cosines, [0.05, 0.5, 0.95]))
        print(f"| {name} | {len(cosines)} | {shown} | {np.mean(cosines < least):.0%} |")


def pieces(photo: UInt8[np.ndarray, "H W 3"], draw: np.random.Generator) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
    """Square pieces of a photograph, anywhere in it."""
    height, width = photo.shape[:2]
    for _ in range(_PIECES):
        side = int(draw.uniform(0.3, 0.8) * min(height, width))
        top, left = draw.integers(height - side + 1), draw.integers(width - side + 1)
        yield photo[top : top + side, left : left + side]


if __name__ == "__main__":
    main()
