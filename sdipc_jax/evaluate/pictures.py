"""Generated pictures measured: are they recognised, and how like the real ones are they (the paper's Table 2)?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.evaluate.backbone import EXTRA, Backbone
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.metrics import (
    bootstrap_interval,
    cosines,
    frechet_distance,
    kernel_distance,
    kernel_distances_of_halves,
    percentiles,
)
from sdipc_jax.evaluate.retrieval import Captions, image_features, retrieval_columns
from sdipc_jax.evaluate.sampling import Sampler, reconstruct, resized
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.prompts.contexts import image_prompt, text_prompt
from sdipc_jax.prompts.projection import Projection, convert
from sdipc_jax.prompts.prompt import AnyPrompt
from sdipc_jax.prompts.tokens import tokenize

OWN, INDEPENDENT = "own CLIP", "EffNet-Lite0"
SD_IPC, TEXT, STYLED, SHUFFLED = "SD-IPC", "text prompt", "text prompt with the style", "SD-IPC of another picture"
REAL, RECONSTRUCTED = "the picture itself", "the picture through the VAE"

Vectors = Float[np.ndarray, "N D"]


@dataclass(frozen=True)
class Backbones:
    """Ways to turn pictures into features: the checkpoint's own CLIP, and an independent one if it is installed."""

    bundle: Bundle
    independent: Backbone | None

    def __call__(self, pictures: UInt8[np.ndarray, "N H W 3"]) -> dict[str, Vectors]:
        features: dict[str, Vectors] = {OWN: image_features(self.bundle, pictures)}
        if self.independent is not None:
            features[INDEPENDENT] = self.independent(pictures)
        return features

    @property
    def names(self) -> tuple[str, ...]:
        return (OWN,) if self.independent is None else (OWN, INDEPENDENT)


@dataclass(frozen=True)
class Measured:
    """Features of the pictures under test.

    Attributes:
        chosen: which of the held-out pictures were given as prompts.
        held: features of all held-out pictures, by backbone.
        made: by kind of prompt, then by backbone: (seeds, N, D).
    """

    chosen: Int[np.ndarray, " N"]
    held: dict[str, Vectors]
    made: dict[str, dict[str, Float[np.ndarray, "S N D"]]]


def choose(held: Corpus, count: int) -> Int[np.ndarray, " N"]:
    """Rows of the held-out pictures in a fixed random order: more of them begin with the same ones."""
    return np.random.default_rng(0).permutation(len(held))[:count]


def shuffled(base: Shaped[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """For each picture another one, of another concept as far as one shift of all can do that.

    >>> shuffled(np.array(["cat", "cat", "dog", "dog"])).tolist()
    [2, 3, 0, 1]
    """
    places = np.arange(len(base))
    shift = min(range(1, len(base)), key=lambda by: int(np.sum(base == np.roll(base, -by))), default=0)
    return np.roll(places, -shift)


def kinds_of_prompt(styled: bool) -> tuple[str, ...]:
    """What pictures are generated from."""
    return (SD_IPC, TEXT, *([STYLED] if styled else []), SHUFFLED)


def prompts_of(bundle: Bundle, vectors: Float[Array, "N D_text"], rows: Corpus, styled: bool) -> dict[str, AnyPrompt]:
    """A prompt for each picture, of every kind; `vectors` are what `convert` made of the pictures."""
    texts = rows.caption.tolist()
    contexts: dict[str, AnyPrompt] = {
        SD_IPC: image_prompt(bundle, vectors),
        TEXT: text_prompt(bundle, tokenize(bundle, texts, truncate=True)),
        SHUFFLED: image_prompt(bundle, vectors[shuffled(rows.base)]),
    }
    if styled:
        with_style = [f"{text}, {style} style" for text, style in zip(texts, rows.style, strict=True)]
        contexts[STYLED] = text_prompt(bundle, tokenize(bundle, with_style, truncate=True))
    return contexts


def measure_pictures(
    bundle: Bundle,
    projection: Projection,
    backbones: Backbones,
    sampler: Sampler,
    held: Corpus,
    chosen: Int[np.ndarray, " N"],
    seeds: Sequence[int],
    styled: bool,
) -> Measured:
    """Generates and keeps the features alone. Row n has the same noise under every kind of prompt."""
    features = backbones(held.pictures)
    rows = held.where(chosen)
    vectors = convert(projection, features[OWN][chosen])
    contexts = prompts_of(bundle, vectors, rows, styled)
    made = {}
    for kind in kinds_of_prompt(styled):
        found = [backbones(sampler(contexts[kind], seed, np.arange(len(chosen)))) for seed in seeds]
        made[kind] = {name: np.stack([each[name] for each in found]) for name in found[0]}
    defaults = bundle.config.defaults
    through_vae = backbones(reconstruct(bundle, resized(rows.pictures, defaults.height, defaults.width)))
    made[RECONSTRUCTED] = {name: values[None] for name, values in through_vae.items()}
    made[REAL] = {name: values[chosen][None] for name, values in features.items()}
    return Measured(chosen, features, made)


def recognition_table(projection: Projection, captions: Captions, held: Corpus, measured: Measured) -> Table:
    """Whether the own CLIP finds the caption of the picture that was the prompt."""
    truth = captions.places(held.caption[measured.chosen])
    visual = np.asarray(projection.visual)
    rows: list[tuple[str, tuple[Estimate | None, ...]]] = []
    hits = {}
    for kind, features in measured.made.items():
        by_seed = [retrieval_columns(x @ visual, captions.joint, truth, captions.base) for x in features[OWN]]
        hits[kind] = {column: np.stack([each[column] for each in by_seed]) for column in by_seed[0]}
        rows.append((kind, tuple(map(Estimate.of_mean, hits[kind].values()))))
    count = len(captions.texts)
    of_concept = np.mean(captions.base[None, :] == captions.base[truth][:, None])
    rows.append(("chance", tuple(Estimate(float(share)) for share in (1 / count, 5 / count, of_concept))))
    ratios = tuple(ratio_of_means(hits[SD_IPC][column], hits[TEXT][column]) for column in hits[TEXT])
    rows.append(("SD-IPC / text prompt", ratios))
    note = (
        f"Does the checkpoint's own CLIP find, among all {count} captions, that of the picture that was the prompt? "
        f"{len(truth)} held-out pictures, {_seeds(measured)}. 95% bootstrap intervals over pictures."
    )
    return Table("recognition", "Generated pictures recognised", note, ("R@1", "R@5", "concept R@1"), tuple(rows))


@dataclass(frozen=True)
class SetDistance:
    """How far generated pictures are from real ones as a set: KID, unbiased.

    Attributes:
        by_seed: of all pictures, a distance a seed.
        halves: of random halves, means over seeds.
    """

    by_seed: tuple[float, ...]
    halves: Float[np.ndarray, " draws"]

    @classmethod
    def of(cls, made: Iterable[Float[np.ndarray, "N D"]], real: Float[np.ndarray, "M D"]) -> Self:
        """From features: of a set of pictures a seed, and of the real ones."""
        sets = list(made)
        halves = np.mean([kernel_distances_of_halves(each, real) for each in sets], axis=0)
        return cls(tuple(kernel_distance(each, real) for each in sets), halves)

    @property
    def estimate(self) -> Estimate:
        """The mean over seeds, with an interval from the halves."""
        by_seed = self.by_seed if len(self.by_seed) > 1 else ()
        return Estimate(float(np.mean(self.by_seed)), percentiles(self.halves), by_seed)

    def over(self, other: "SetDistance") -> Estimate:
        """How many times as large as another's it is, over the same halves."""
        times = float(np.mean(self.by_seed) / np.mean(other.by_seed))
        return Estimate(times, percentiles(self.halves / other.halves))


def similarity_table(backbones: Backbones, measured: Measured) -> Table:
    """Likeness to the picture that was the prompt, and the distance of the sets of pictures."""
    columns: list[str] = []
    values: dict[str, list[Estimate | None]] = {kind: [] for kind in measured.made}
    difference: list[Estimate | None] = []
    ratio: list[Estimate | None] = []
    for name in backbones.names:
        columns += [f"similarity, {name}", f"kernel distance, {name}"]
        reference = measured.held[name]
        likeness = {kind: _likeness(features[name], measured, name) for kind, features in measured.made.items()}
        # The real pictures are part of the reference: no distance of two sets.
        distances = {
            kind: SetDistance.of(features[name], reference) for kind, features in measured.made.items() if kind != REAL
        }
        for kind in measured.made:
            values[kind].append(Estimate.of_mean(likeness[kind]))
            values[kind].append(distances[kind].estimate if kind in distances else None)
        gain = (likeness[SD_IPC] - likeness[TEXT]).mean(axis=0)
        difference += [Estimate(float(gain.mean()), bootstrap_interval(gain)), None]
        ratio += [None, distances[SD_IPC].over(distances[TEXT])]
    note = (
        f"{len(measured.chosen)} held-out pictures, {_seeds(measured)}. Similarity: cosine of features of a generated "
        "picture and of the picture that was the prompt, with 95% bootstrap intervals over pictures. Kernel distance: "
        f"KID, unbiased, to all {len(measured.held[OWN])} held-out pictures, with 95% intervals from 200 random halves."
    )
    if INDEPENDENT in backbones.names:
        columns.append("EffNet-Lite0 Frechet distance")
        for kind, features in measured.made.items():
            found = [frechet_distance(x, measured.held[INDEPENDENT]) for x in features[INDEPENDENT]]
            values[kind].append(None if kind == REAL else Estimate(float(np.mean(found))))
        note += " The Frechet distance is biased upwards by the few pictures: it compares the rows, no more."
        difference.append(None)
        ratio.append(None)
    else:
        note += f" The independent backbone EffNet-Lite0 is not installed: {EXTRA} adds its columns."
    rows = [(kind, tuple(found)) for kind, found in values.items()]
    rows += [("SD-IPC - text prompt", tuple(difference)), ("SD-IPC / text prompt", tuple(ratio))]
    return Table("similarity", "Likeness to the picture", note, tuple(columns), tuple(rows))


def _likeness(made: Float[np.ndarray, "S N D"], measured: Measured, name: str) -> Float[np.ndarray, "S N"]:
    return np.stack([cosines(each, measured.held[name][measured.chosen]) for each in made])


def ratio_of_means(x: Float[np.ndarray, "S N"], y: Float[np.ndarray, "S N"]) -> Estimate | None:
    """The ratio of two means over the same pictures, with a bootstrap interval; None if the second is 0."""
    x, y = x.mean(axis=0), y.mean(axis=0)
    if not y.any():
        return None
    drawn = np.random.default_rng(0).integers(len(x), size=(2000, len(x)))
    above, below = x[drawn].mean(axis=1), y[drawn].mean(axis=1)
    return Estimate(float(x.mean() / y.mean()), percentiles(above[below > 0] / below[below > 0]))


def _seeds(measured: Measured) -> str:
    count = len(measured.made[SD_IPC][OWN])
    return f"{count} seeds each" if count > 1 else "one seed"
