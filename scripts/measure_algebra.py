"""What arithmetic with pictures does, on the checkpoint that ships: the tables and sheets of docs/algebra.md.

    python scripts/measure_algebra.py --output build/algebra

Drawings that were held out from training, judged by the checkpoint's own CLIP and by their pixels. A quarter of an hour
on two cores.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import gaussian_filter, sobel

import sdipc_jax as sdipc
from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.evaluate import retrieval
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.evaluate.metrics import cosines, ranks, unit
from sdipc_jax.evaluate.pictures import choose
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.pictures.sheets import contact_sheet
from sdipc_jax.prompts import algebra, everyday
from sdipc_jax.prompts.contexts import empty_prompt, image_prompt
from sdipc_jax.prompts.projection import mean_end_state
from sdipc_jax.prompts.words import TEMPLATES, encode_words
from sdipc_jax.sampling import start_from, weights
from sdipc_jax.sampling.decoding import to_uint8

SETTINGS: dict[str, Any] = {"steps": 12, "sampler": "dpm++2m"}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
NOUNS = (*everyday.THING, *everyday.VEHICLE, *everyday.FOOD)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
_BATCH = 16
_COLORS_OF_SHEETS = 128

Pictures = UInt8[np.ndarray, "N H W 3"]
Vectors = Float[np.ndarray, "N D"]


class Bench:
    """The checkpoint, the drawings, and the captions that a picture may be taken for."""

    def __init__(self, corpus: Path) -> None:
        self.bundle = bundle = sdipc.load("embedded")
        self.corpus = load_corpus(corpus)
        self.known = self.corpus.known
        self.captions = retrieval.encode_captions(bundle, self.known)
        self.projection = sdipc.closed_form(bundle)
        self.visual = np.asarray(self.projection.visual)
        self.middle = np.asarray(mean_end_state(bundle))

    def vectors(self, pictures: Pictures) -> Vectors:
        features = retrieval.image_features(self.bundle, pictures)
        return np.asarray(sdipc.convert(self.projection, jnp.asarray(features)))

    def prompts(self, vectors: Any) -> np.ndarray:
        """Prompts of vectors, which get a prompt's length again, as `mix` does it."""
        return np.asarray(image_prompt(self.bundle, algebra.with_length(vectors, self.projection.scale)))

    def joint(self, pictures: Pictures) -> Vectors:
        return retrieval.image_features(self.bundle, pictures) @ self.visual

    def states(self, texts: list[str]) -> Vectors:
        return retrieval.end_states(self.bundle, texts)

    def texts(self, texts: list[str]) -> Vectors:
        return self.states(texts) @ retrieval.text_projection(self.bundle)

    def sample(self, context: np.ndarray, *, start: Pictures | None = None, seed: int = 0, **settings: Any) -> Pictures:
        """Picture n from noise n, whatever the prompts: rows of two calls are pairs."""
        strength = settings.pop("strength", 1.0)

        def batch(context: np.ndarray, indices: np.ndarray, *pictures: np.ndarray) -> np.ndarray:
            begun: dict[str, Any] = {}
            if pictures:
                begun["start"] = start_from(self.bundle, pictures[0] / 255, strength)
            made = sdipc.generate(
                self.bundle, jnp.asarray(context), seeds=seed, indices=indices, **begun, **SETTINGS | settings
            )
            return to_uint8(made)

        rows = (context, np.arange(len(context)), *(() if start is None else (start,)))
        return in_batches(batch, *rows, size=_BATCH)

    def found(self, pictures: Pictures, captions: np.ndarray, at: int) -> Bool[np.ndarray, " N"]:
        """Whether each picture finds its caption among the `at` nearest."""
        scores = unit(self.joint(pictures)) @ unit(self.captions.joint).T
        return ranks(scores, self.captions.places(captions)) < at


def estimates(*columns: np.ndarray) -> tuple[Estimate, ...]:
    return tuple(Estimate.of_mean(np.asarray(column, np.float64)[None]) for column in columns)


def save_sheet(rows: list[list[np.ndarray]], labels: list[str], path: Path) -> None:
    """In a palette, to keep it small."""
    contact_sheet(rows, labels, cell=64).quantize(_COLORS_OF_SHEETS).save(path, optimize=True)


def mixes(bench: Bench, count: int, output: Path) -> Table:
    """Is a mix of two drawings recognised as either of them?"""
    held = bench.known.where(bench.known.split == "cells")
    held = held.where(choose(held, 2 * count))
    first, second = held.where(np.arange(count)), held.where(np.arange(count, 2 * count))
    vectors = [bench.vectors(each.pictures) for each in (first, second)]
    third = np.roll(first.caption, 1)
    rows, sheet = [], [list(first.pictures[:8]), list(second.pictures[:8])]
    for name, vector in (
        ("the first alone", vectors[0]),
        ("three to one", 0.75 * vectors[0] + 0.25 * vectors[1]),
        ("half and half", 0.5 * vectors[0] + 0.5 * vectors[1]),
        ("the second alone", vectors[1]),
    ):
        made = bench.sample(bench.prompts(vector))
        one, other, wrong = (bench.found(made, names, 10) for names in (first.caption, second.caption, third))
        rows.append((name, estimates(one, other, one | other, wrong)))
        sheet.append(list(made[:8]))
    labels = ["first", "second", *(name for name, _ in rows)]
    save_sheet(sheet, labels, output / "algebra-mixes.png")
    note = f"{count} pairs of held-out drawings; whose caption is among the 10 nearest of {len(bench.captions.texts)}."
    return Table("mixes", "Mixes", note, ("the first's", "the second's", "either's", "another's"), tuple(rows))


def color_directions(bench: Bench, color: str) -> dict[str, Vectors]:
    """Ways to say what a color is in the space of texts."""
    alone = bench.states([color]) - bench.middle
    pairs = bench.states([f"{color} {noun}" for noun in NOUNS]) - bench.states(list(NOUNS))
    principal = np.linalg.svd(pairs, full_matrices=False)[2]
    return {
        "the word less the mean text": alone,
        "mean of `color noun` less `noun`": pairs.mean(axis=0, keepdims=True),
        "two principal ones of these": principal[:2],
        "four principal ones of these": principal[:4],
    }


def without(bench: Bench, count: int, output: Path) -> Table:
    """Does projecting a color out take the color, and leave the thing?"""
    held = bench.corpus.where(bench.corpus.split != "train")
    words = [set(caption.split()) for caption in held.caption]
    chosen = [(row, color) for row, each in enumerate(words) for color in COLORS if color in each]
    chosen = [chosen[place] for place in np.random.default_rng(0).permutation(len(chosen))[:count]]
    colors = np.array([color for _, color in chosen])
    held = held.where(np.array([row for row, _ in chosen]))
    things = [
        " ".join(word for word in caption.split() if word != color)
        for caption, color in zip(held.caption, colors, strict=True)
    ]
    vectors = bench.vectors(held.pictures)
    directions = {color: color_directions(bench, color) for color in COLORS}
    targets, kept = bench.texts(list(colors)), bench.texts(things)
    rows, sheet = [], [list(held.pictures[:8])]
    for name in ("nothing", *directions[COLORS[0]]):
        changed = vectors
        if name != "nothing":
            changed = np.concatenate(
                [
                    bench.middle + algebra.project_out(vector[None] - bench.middle, directions[color][name])
                    for vector, color in zip(vectors, colors, strict=True)
                ]
            )
        made = bench.sample(bench.prompts(changed))
        joint = bench.joint(made)
        hues = np.array([share_of(color, picture) for picture, color in zip(made, colors, strict=True)])
        rows.append((name, estimates(cosines(joint, targets), hues, cosines(joint, kept), edges(made, held.pictures))))
        sheet.append(list(made[:8]))
    labels = ["drawings", *(f"without {name}" for name, _ in rows)]
    save_sheet(sheet, labels, output / "algebra-without.png")
    note = (
        f"{count} drawings that were not trained on, whose captions name a color ({', '.join(COLORS)}). Agreement is "
        "the cosine of picture and text in the joint space, the share that of pixels that are not white."
    )
    columns = ("agreement with the color", "share of the color", "agreement with the thing", "edges")
    return Table("without", "Projecting a color out", note, columns, tuple(rows))


def layers(bench: Bench, count: int) -> Table:
    """What does each layer of cross-attention take from the picture, the others being told nothing?"""
    held = bench.known.where(bench.known.split == "cells")
    held = held.where(choose(held, count))
    features = retrieval.image_features(bench.bundle, held.pictures)
    prompts = bench.prompts(bench.vectors(held.pictures))
    both = np.stack([prompts, np.broadcast_to(np.asarray(empty_prompt(bench.bundle)), prompts.shape)], axis=1)
    unet = bench.bundle.config.unet
    names = weights.layer_names(unet)
    groups = list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))
    rows = []
    for name in ("none", "all", *names, *groups):
        chosen = {"none": [], "all": list(names)}.get(name, [name])
        made = bench.sample(both, weights=weights.and_the_rest(weights.over_layers(unet, chosen)))
        own = retrieval.image_features(bench.bundle, made)
        measured = estimates(colors_alike(made, held.pictures), edges(made, held.pictures), cosines(own, features))
        rows.append((name, measured))
    note = (
        f"{count} held-out drawings. The picture's prompt in the layers that are named, the empty text's in the "
        "others. Colors: shared part of the histograms of pixels that are not white. Edges: correlation of blurred "
        "edges."
    )
    return Table("layers", "Layers", note, ("colors", "edges", "likeness, own CLIP"), tuple(rows))


def strengths(bench: Bench, count: int, output: Path) -> Table:
    """Does a start from the picture trade likeness of layout against variety?"""
    held = bench.known.where(bench.known.split == "cells")
    held = held.where(choose(held, count))
    prompts = bench.prompts(bench.vectors(held.pictures))
    rows, sheet = [], [list(held.pictures[:8])]
    for strength in (*STRENGTHS, None):
        begun: dict[str, Any] = {} if strength is None else {"start": held.pictures, "strength": strength}
        made = [bench.sample(prompts, seed=seed, **begun) for seed in (0, 1)]
        pixels = correlations(*(each.reshape(count, -1) for each in (made[0], held.pictures)))
        variety = np.sqrt(np.mean((made[0].astype(float) - made[1]) ** 2, axis=(1, 2, 3)))
        name = "noise alone" if strength is None else f"strength {strength:g}"
        rows.append((name, estimates(pixels, edges(made[0], held.pictures), variety)))
        sheet.append(list(made[0][:8]))
    save_sheet(sheet, ["drawings", *(name for name, _ in rows)], output / "algebra-strengths.png")
    note = f"{count} held-out drawings, two seeds. Variety: distance of the two results, in levels of 255."
    return Table("strengths", "Starting from the picture", note, ("pixels", "edges", "variety"), tuple(rows))


def words(bench: Bench) -> Table:
    """Is a held-out drawing's caption the nearest of all captions, as words?"""
    held = bench.known.where(bench.known.split == "cells")
    joint, truth = bench.joint(held.pictures), bench.captions.places(held.caption)
    tower = load_text_tower(bench.bundle.config)
    names = bench.captions.texts.tolist()
    vectors = bench.vectors(held.pictures)
    found = {
        "T-space retrieval": unit(vectors) @ unit(bench.captions.states).T,
        "words as they are": unit(joint) @ encode_words(tower, names, ("{}",)).vectors.T,
        f"words in {len(TEMPLATES)} templates": unit(joint) @ encode_words(tower, names).vectors.T,
    }
    rows = [(name, estimates(*(ranks(scores, truth) < at for at in (1, 5, 10)))) for name, scores in found.items()]
    note = f"{len(held)} held-out drawings, each against {len(names)} captions."
    return Table("words", "Words", note, ("R@1", "R@5", "R@10"), tuple(rows))


def share_of(color: str, picture: UInt8[np.ndarray, "H W 3"]) -> float:
    """How many of the pixels that are neither white, grey nor black have a color's hue, of all that are not white."""
    pixels = picture.reshape(-1, 3).astype(float) / 255
    pixels = pixels[pixels.min(axis=1) < 0.9]
    if not len(pixels):
        return 0.0
    largest, smallest = pixels.max(axis=1), pixels.min(axis=1)
    spread = np.maximum(largest - smallest, 1e-9)
    red, green, blue = pixels.T
    sector = np.select(
        [largest == red, largest == green],
        [(green - blue) / spread % 6, (blue - red) / spread + 2],
        (red - green) / spread + 4,
    )
    low, high = {
        "red": (-20, 18),
        "orange": (18, 42),
        "yellow": (42, 70),
        "green": (70, 165),
        "blue": (165, 255),
        "purple": (255, 315),
    }[color]
    return float(np.mean((spread > 0.2) & ((60 * sector - low) % 360 < high - low)))


def edges(made: Pictures, pictures: Pictures) -> Float[np.ndarray, " N"]:
    """The correlation of two pictures' blurred edges."""

    def found(pictures: Pictures) -> np.ndarray:
        grey = pictures.astype(float).mean(axis=-1)
        strength = np.hypot(sobel(grey, axis=1), sobel(grey, axis=2))
        return gaussian_filter(strength, (0, 1.5, 1.5)).reshape(len(pictures), -1)

    return correlations(found(made), found(pictures))


def correlations(x: Float[Any, "N P"], y: Float[Any, "N P"]) -> Float[np.ndarray, " N"]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    return cosines(x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True))


def colors_alike(made: Pictures, pictures: Pictures) -> Float[np.ndarray, " N"]:
    """The shared part of the histograms of colors, without white, in eight bins a channel, blurred by one."""

    def histogram(picture: np.ndarray) -> np.ndarray:
        pixels = picture.reshape(-1, 3)
        pixels = pixels[pixels.min(axis=1) < 230]
        counts = np.histogramdd(pixels, bins=8, range=[(0, 256)] * 3)[0]
        return gaussian_filter(counts, 0.7) / max(1, len(pixels))

    return np.array([np.minimum(histogram(a), histogram(b)).sum() for a, b in zip(made, pictures, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus.npz"))
    parser.add_argument("--count", type=int, default=64, help="drawings, or pairs of them")
    parser.add_argument("--output", type=Path, default=Path("build/algebra"), help="folder of tables.md and the sheets")
    parser.add_argument("--only", nargs="*", default=["words", "without", "mixes", "layers", "strengths"])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.corpus)
    tables: dict[str, Callable[[], Table]] = {
        "words": partial(words, bench),
        "without": partial(without, bench, arguments.count, arguments.output),
        "mixes": partial(mixes, bench, arguments.count, arguments.output),
        "layers": partial(layers, bench, arguments.count),
        "strengths": partial(strengths, bench, arguments.count, arguments.output),
    }
    for name in arguments.only:
        found = tables[name]().to_markdown()
        (arguments.output / f"{name}.md").write_text(found + "\n", encoding="utf-8")
        print(found, flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
