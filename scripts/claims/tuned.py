"""How what was tuned is judged: variations and edits of drawings, beside those without tuning."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

import sdipc_jax as sdipc
from claims.results import kept
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.editing import EDITS
from sdipc_jax.evaluate.metrics import cosines
from sdipc_jax.evaluate.pictures import OWN, Backbones, SetDistance
from sdipc_jax.evaluate.retrieval import (
    Captions,
    end_states,
    image_features,
    retrieval_columns,
    text_projection,
)
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.files import write_atomically
from sdipc_jax.pictures.sheets import contact_sheet
from sdipc_jax.prompts.projection import Projection
from sdipc_jax.records import digest_of

UNTUNED = "SD-IPC"
# The control of what deep prompts learn: the same random tokens in the vision tower as runs begin with.
UNTRAINED = "prompts, not trained"
ALPHA = 0.9
SPOKEN = "text prompts recognised"

Pictures = UInt8[np.ndarray, "N H W 3"]
# By backbone.
Features = dict[str, Float[np.ndarray, "N D"]]
# By the measure's name: a value for each picture.
Values = dict[str, Float[np.ndarray, " N"]]


@dataclass(frozen=True)
class Judge:
    """How generated pictures are judged: with features that no tuning has touched.

    Attributes:
        captions: all that a picture made from text may be taken for.
        sampled: told how many pictures have been made.
        sampling: settings of `generate`.
        work: where pictures are kept, so that a measurement that was stopped goes on.
    """

    bundle: Bundle
    projection: Projection
    captions: Captions
    backbones: Backbones
    sampled: Callable[[int], object]
    sampling: Mapping[str, Any]
    work: Path

    def sample(self, bundle: Bundle, context: Any, seed: int) -> Pictures:
        """A picture of each prompt."""
        self.sampled(len(context))
        sampler = Sampler(bundle, dict(self.sampling), min(8, len(context)), len(context), lambda done: None)
        weights = jax.tree.leaves((bundle.params["unet"], context))
        named = digest_of([seed, dict(self.sampling), [np.asarray(leaf).tobytes() for leaf in weights]])
        return kept(self.work / f"{named[:16]}.npy", lambda: sampler(context, seed, np.arange(len(context))))

    def agreement(self, made: Features, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Cosines of pictures and texts in C-space, by the own CLIP."""
        targets = end_states(self.bundle, list(texts)) @ text_projection(self.bundle)
        return cosines(made[OWN] @ np.asarray(self.projection.visual), targets)

    def recognised(self, made: Pictures, captions: Shaped[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Whether the own CLIP finds a picture's caption among all."""
        found = image_features(self.bundle, made) @ np.asarray(self.projection.visual)
        columns = retrieval_columns(found, self.captions.joint, self.captions.places(captions), self.captions.base)
        return columns["R@1"]

    def spoken(self, bundle: Bundle, captions: Shaped[np.ndarray, " N"], seed: int) -> Float[np.ndarray, " N"]:
        """Whether pictures of these captions are recognised."""
        tokens = sdipc.tokenize(bundle, captions.tolist(), truncate=True)
        return self.recognised(self.sample(bundle, sdipc.text_prompt(bundle, tokens), seed), captions)


def write_data(corpus: Corpus, folder: Path) -> Path:
    """Drawings and their captions as `sdipc tune` reads them, with the thing that is drawn as its class."""
    names = [f"{number:03}.png" for number in range(len(corpus))]
    lines = [
        json.dumps({"picture": name, "class": str(label), "caption": str(caption)}) + "\n"
        for name, label, caption in zip(names, corpus.base, corpus.caption, strict=True)
    ]
    file, text = folder / "captions.jsonl", "".join(lines).encode()
    # It is written last, so that the pictures are there where it is.
    if not file.is_file() or file.read_bytes() != text:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in zip(names, corpus.pictures, strict=True):
            Image.fromarray(picture).save(folder / name)
        write_atomically(file, text)
    return file


def edits_for(shown: Corpus) -> list[str]:
    """For each picture a text that can change it, in turn where there are several."""
    applies = [edit.applies(shown) for edit in EDITS]
    texts = []
    for number in range(len(shown)):
        able = [edit.text for edit, each in zip(EDITS, applies, strict=True) if each[number]]
        texts.append(able[number % len(able)] if able else EDITS[-1].text)
    return texts


def likeness(made: Features, real: Features) -> Values:
    """Cosines of features, by backbone."""
    return {f"{name} similarity": cosines(made[name], real[name]) for name in made}


@dataclass(frozen=True)
class Measured:
    """Pictures, and how good they are.

    Attributes:
        features: of the pictures.
    """

    values: Values
    features: Features
    pictures: Pictures


def variations(judge: Judge, bundles: Sequence[Bundle], shown: Sequence[Corpus], real: Features, seed: int) -> Measured:
    """Has each checkpoint vary its own part of the pictures, whose features are `real`."""
    made = [
        judge.sample(tuned, sdipc.image_prompt(tuned, _vectors(tuned, rows)), seed)
        for tuned, rows in zip(bundles, shown, strict=True)
    ]
    pictures = np.concatenate(made)
    features = judge.backbones(pictures)
    captions = [str(caption) for rows in shown for caption in rows.caption]
    agreement = {"agreement with the caption": judge.agreement(features, captions)}
    return Measured(likeness(features, real) | agreement, features, pictures)


def edits(
    judge: Judge,
    bundles: Sequence[Bundle],
    shown: Sequence[Corpus],
    real: Features,
    texts: Sequence[Sequence[str]],
    seed: int,
) -> Measured:
    """The same with a text for each picture, by eq. 8."""
    made = []
    for tuned, rows, part in zip(bundles, shown, texts, strict=True):
        tokens = sdipc.tokenize(tuned, list(part))
        made.append(judge.sample(tuned, sdipc.edit_prompt(tuned, _vectors(tuned, rows), tokens, ALPHA), seed))
    pictures = np.concatenate(made)
    features = judge.backbones(pictures)
    agreement = {"agreement with the text": judge.agreement(features, [text for part in texts for text in part])}
    return Measured(likeness(features, real) | agreement, features, pictures)


def _vectors(bundle: Bundle, rows: Corpus) -> Any:
    return sdipc.convert(sdipc.closed_form(bundle), image_features(bundle, rows.pictures))


def table(
    name: str, title: str, note: str, found: Mapping[str, Sequence[Values]], prompted: Sequence[str] = ()
) -> Table:
    """A row for each kind: its mean, and what it gains over no tuning on the same pictures.

    Args:
        prompted: kinds that begin with deep prompts; what they gain over these as they begin stands there too.
    """
    columns = list(found[UNTUNED][0])
    scores = {kind: {column: np.stack([each[column] for each in found[kind]]) for column in columns} for kind in found}
    rows: list[tuple[str, tuple[Estimate | None, ...]]] = [
        (kind, tuple(Estimate.of_mean(values[column]) for column in columns)) for kind, values in scores.items()
    ]
    pairs = [(kind, UNTUNED) for kind in list(found)[1:]] + [(kind, UNTRAINED) for kind in prompted]
    for kind, other in pairs:
        gains = (scores[kind][column] - scores[other][column] for column in columns)
        rows.append((f"{kind} - {other}", tuple(map(Estimate.of_mean, gains))))
    return Table(name, title, note, tuple(columns), tuple(rows))


def distances(found: Mapping[str, Sequence[Measured]], real: Features) -> Table:
    """How far the sets of pictures are from real ones, and as a multiple of the distance without tuning."""
    values: dict[str, list[Estimate | None]] = {kind: [] for kind in found}
    values |= {f"{kind} / {UNTUNED}": [] for kind in found if kind != UNTUNED}
    for name, reference in real.items():
        sets = {kind: SetDistance.of((each.features[name] for each in found[kind]), reference) for kind in found}
        for kind, distance in sets.items():
            values[kind].append(distance.estimate)
            if kind != UNTUNED:
                values[f"{kind} / {UNTUNED}"].append(distance.over(sets[UNTUNED]))
    drawn, held = len(found[UNTUNED][0].pictures), len(next(iter(real.values())))
    note = (
        f"KID, unbiased, of the {drawn} variations of a seed to all {held} held-out drawings of known things, with 95% "
        "intervals from 200 random halves."
    )
    columns = tuple(f"kernel distance, {name}" for name in real)
    return Table(
        "sets", "Variations as a set", note, columns, tuple((row, tuple(each)) for row, each in values.items())
    )


def sheet(
    shown: Sequence[Corpus],
    edits: Sequence[Sequence[str]],
    made: Mapping[str, tuple[Pictures, Pictures]],
    each: int,
) -> Image.Image:
    """The first pictures of each part: the drawing, its variations of each kind, its edits of each kind."""
    rows, labels, start = [], [], 0
    for part, texts in zip(shown, edits, strict=True):
        for n in range(min(each, len(part))):
            rows.append([part.pictures[n], *(pair[kind][start + n] for kind in (0, 1) for pair in made.values())])
            labels.append(f"{part.caption[n]}; then with {texts[n]!r}")
        start += len(part)
    return contact_sheet(rows, labels, cell=96)
