"""Editing measured: what happens to a picture as a text's weight grows from 0 to 1 (eq. 8, the paper's Fig. 15)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.text_tower import TextTower
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.metrics import cosines, spearman
from sdipc_jax.evaluate.retrieval import image_features, joint_vectors
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.prompts.contexts import edit_prompt
from sdipc_jax.prompts.projection import Projection, convert
from sdipc_jax.prompts.tokens import tokenize

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

_PICTURES_ON_SHEET = 3
_COLOURABLE = re.compile(
    r"\b(heart|circle|square|diamond|star|book|notebook|hat|cap|backpack|automobile|car|truck|minibus|balloon|bird|"
    r"cat|mushroom|apple|peach|pepper|lemon|tangerine|door|bed|chair|robot|owl|snake|parrot|lantern)\b"
)


@dataclass(frozen=True)
class Edit:
    """A text, and which pictures it can change."""

    kind: str
    text: str

    def applies(self, corpus: Corpus) -> Bool[np.ndarray, " N"]:
        if self.kind == "skin tone":
            return np.isin(corpus.tone, (1, 2))
        if self.kind == "style":
            return (corpus.vendor != "fluent") & (corpus.tone == 0)
        can = [bool(_COLOURABLE.search(each)) and self.text not in each for each in corpus.caption]
        return np.array(can) & (corpus.tone == 0)


EDITS = (Edit("colour", "blue"), Edit("skin tone", "dark skin tone"), Edit("style", "3d style"))


@dataclass(frozen=True)
class Sweep:
    """One text at all weights, on several pictures.

    Attributes:
        agreement: cosine of the generated picture and the text in C-space, (N, alphas), the mean over seeds.
        similarity: cosine of the features of the generated picture and of the one that was edited.
        rows: for the sheet: the picture, then its edits, of the first seed.
        labels: of those rows.
    """

    edit: Edit
    agreement: Float[np.ndarray, "N K"]
    similarity: Float[np.ndarray, "N K"]
    rows: list[list[UInt8[np.ndarray, "H W 3"]]]
    labels: list[str]


def choose_for(edit: Edit, held: Corpus, count: int) -> Int[np.ndarray, " N"]:
    """Held-out pictures that the text can change, in a fixed random order, the same thing once only."""
    able = np.flatnonzero(edit.applies(held))
    able = np.random.default_rng(1).permutation(able)
    _, first = np.unique(held.base[able], return_index=True)
    return able[np.sort(first)][:count]


def sweep(
    bundle: Bundle,
    projection: Projection,
    sampler: Sampler,
    held: Corpus,
    chosen: Int[np.ndarray, " N"],
    edit: Edit,
    seeds: Sequence[int],
    tower: TextTower | None = None,
) -> Sweep:
    """Edits each picture at every weight, from the same noise.

    Args:
        tower: the CLIP's own, where the states that the UNet reads do not lead to the joint space.
    """
    pictures = held.pictures[chosen]
    features = image_features(bundle, pictures)
    weights = jnp.tile(jnp.array(ALPHAS), len(chosen))
    vectors = jnp.repeat(convert(projection, jnp.asarray(features)), len(ALPHAS), axis=0)
    context = edit_prompt(bundle, vectors, tokenize(bundle, [edit.text]), weights)
    indices = np.repeat(np.arange(len(chosen)), len(ALPHAS))
    made = [sampler(context, seed, indices) for seed in seeds]
    target = joint_vectors(bundle, [edit.text], tower)
    shape = (len(seeds), len(chosen), len(ALPHAS))
    found = image_features(bundle, np.concatenate(made))
    agreement = cosines(found @ np.asarray(projection.visual), target).reshape(shape)
    similarity = cosines(found, np.tile(np.repeat(features, len(ALPHAS), axis=0), (len(seeds), 1))).reshape(shape)
    shown = min(_PICTURES_ON_SHEET, len(chosen))
    by_picture = made[0].reshape(len(chosen), len(ALPHAS), *made[0].shape[1:])
    return Sweep(
        edit,
        agreement.mean(axis=0),
        similarity.mean(axis=0),
        [[pictures[n], *by_picture[n]] for n in range(shown)],
        [f"{held.caption[n]} + {edit.text!r}, alpha 0 to 1" for n in chosen[:shown]],
    )


def editing_table(sweeps: Sequence[Sweep], seeds: int) -> Table:
    """Trends over the weights, for each text and over all."""

    def row(agreement: Float[np.ndarray, "N K"], similarity: Float[np.ndarray, "N K"]) -> tuple[Estimate, ...]:
        weights = np.broadcast_to(ALPHAS, agreement.shape)
        trends = [Estimate.of_mean(spearman(weights, each)[None]) for each in (agreement, similarity)]
        ends = [Estimate(float(each[:, end].mean())) for each in (agreement, similarity) for end in (0, -1)]
        return (*trends, *ends)

    rows = [(f"{each.edit.kind}: {each.edit.text!r}", row(each.agreement, each.similarity)) for each in sweeps]
    together = row(np.concatenate([s.agreement for s in sweeps]), np.concatenate([s.similarity for s in sweeps]))
    counts = ", ".join(str(len(each.agreement)) for each in sweeps)
    note = (
        f"Held-out pictures ({counts}) edited with alpha {', '.join(f'{alpha:g}' for alpha in ALPHAS)}, "
        f"{'one seed' if seeds == 1 else f'mean over {seeds} seeds'}, judged by the own CLIP. Trend: Spearman's rank "
        "correlation with alpha for each picture, averaged, with 95% bootstrap intervals over pictures. Agreement with "
        "the text should rise and similarity to the picture fall."
    )
    columns = (
        "agreement, trend",
        "similarity, trend",
        "agreement at 0",
        "agreement at 1",
        "similarity at 0",
        "similarity at 1",
    )
    return Table("editing", "Editing", note, columns, (*rows, ("all", together)))


def plot_editing(sweeps: Sequence[Sweep], path: Path) -> None:
    """Draws both measures over alpha, as a PNG."""
    # Slow to import, and only needed here.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for each in sweeps:
        for axes, values in ((left, each.agreement), (right, each.similarity)):
            error = values.std(axis=0, ddof=min(1, len(values) - 1)) / np.sqrt(len(values))
            axes.errorbar(ALPHAS, values.mean(axis=0), error, marker="o", capsize=3, label=repr(each.edit.text))
    left.set(xlabel="alpha", ylabel="cosine", title="Agreement with the text")
    right.set(xlabel="alpha", ylabel="cosine", title="Similarity to the picture")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=120)
