"""Table 2's shape on drawings: variations by the inverse and by what could take its place, beside the captions' own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from claims.results import kept
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.delta import digest
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.metrics import cosines
from sdipc_jax.evaluate.pictures import (
    SD_IPC,
    SHUFFLED,
    TEXT,
    Backbones,
    Measured,
    choose,
    recognition_table,
    shuffled,
    similarity_table,
)
from sdipc_jax.evaluate.retrieval import encode_captions, image_features, retrieval_columns, text_projection
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.pictures.sheets import contact_sheet
from sdipc_jax.prompts.calibration import fit_captions, mean_of_pictures, shifted
from sdipc_jax.prompts.contexts import image_prompt, text_prompt
from sdipc_jax.prompts.projection import Projection, closed_form, convert
from sdipc_jax.prompts.tokens import tokenize

# What a map is fitted to, what the mean shift is taken from, and what sets of pictures are compared with.
_CAPTIONS, _MEAN, REFERENCE = 3000, 300, 512
# Vectors that differ by less draw the same pictures.
_SAME = 0.9999

Pictures = UInt8[np.ndarray, "N H W 3"]


@dataclass(frozen=True)
class Drawn:
    """Everything that was found of one checkpoint's variations.

    Attributes:
        sheet: rows of drawings, each followed by its picture of every kind.
        kinds: those of the sheet, in order.
    """

    tables: list[Table]
    sheet: Image.Image
    kinds: tuple[str, ...]


def conversions(bundle: Bundle, corpus: Corpus) -> dict[str, Projection]:
    """The paper's inverse first, then all that is compared with it, each as `convert` takes it."""
    train = corpus.where(corpus.split == "train")
    order = np.random.default_rng(0).permutation
    captions = order(np.unique(train.caption))[:_CAPTIONS].tolist()
    pictures = train.pictures[order(len(train))[:_MEAN]]
    fitted = fit_captions(bundle, load_text_tower(bundle.config), captions)
    mean = mean_of_pictures(bundle, image_features(bundle, pictures))
    inverse = closed_form(bundle)
    matrix = text_projection(bundle).astype(np.float64)
    gram = matrix.T @ matrix + bundle.config.defaults.cutoff**2 * np.eye(matrix.shape[1])
    return {
        SD_IPC: inverse,
        "raw inverse": closed_form(bundle, 0.0),
        "Tikhonov": replace(inverse, inverse=jnp.asarray(np.linalg.solve(gram, matrix.T), jnp.float32)),
        "inverse, mean shift": shifted(inverse, mean, fitted.map.centre),
        "ridge": fitted.projection(bundle),
        "ridge, mean shift": fitted.projection(bundle, mean),
    }


def measure(
    bundle: Bundle,
    corpus: Corpus,
    backbones: Backbones,
    *,
    count: int,
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
    work: Path,
    report: Callable[[float], None],
) -> Drawn:
    """Draws held-out pictures and their captions anew, and judges both.

    Args:
        sampling: settings of `generate`.
        work: where pictures are kept, so that a measurement that was stopped goes on.
    """
    known, cells = corpus.known, corpus.held_out("cells")
    held = cells.where(choose(cells, max(REFERENCE, count)))
    chosen = np.arange(count)
    rows, real = held.where(chosen), backbones(held.pictures)
    features = image_features(bundle, rows.pictures)
    projections = conversions(bundle, corpus)
    vectors = {name: np.asarray(convert(each, jnp.asarray(features))) for name, each in projections.items()}
    same = {
        name: next(other for other in vectors if cosines(found, vectors[other]).min() > _SAME)
        for name, found in vectors.items()
    }
    contexts = {TEXT: text_prompt(bundle, tokenize(bundle, rows.caption.tolist(), truncate=True))}
    contexts |= {name: image_prompt(bundle, jnp.asarray(each)) for name, each in vectors.items() if same[name] == name}
    contexts[SHUFFLED] = image_prompt(bundle, jnp.asarray(vectors[SD_IPC][shuffled(rows.base)]))
    sampler = Sampler(bundle, dict(sampling), 8, count * len(seeds) * len(contexts), report)
    work = work / "-".join(map(str, (digest(bundle)[:8], count, *sampling.values())))
    made: dict[str, dict[str, Float[np.ndarray, "S N D"]]] = {}
    first: dict[str, Pictures] = {}
    for name, context in contexts.items():
        pictures = [kept(work / f"{name}-{seed}.npy", partial(sampler, context, seed, chosen)) for seed in seeds]
        found = [backbones(each) for each in pictures]
        made[name] = {judge: np.stack([each[judge] for each in found]) for judge in found[0]}
        first[name] = pictures[0]
    captions, inverse = encode_captions(bundle, known), projections[SD_IPC]
    told = [f"{name} draws as {other} does" for name, other in same.items() if name != other]
    # The paper's rows first, in the order of evaluate's tables.
    measured = Measured(chosen, real, {name: made[name] for name in (SD_IPC, *(n for n in made if n != SD_IPC))})
    tables = [
        recognition_table(inverse, captions, held, measured),
        similarity_table(backbones, measured),
        gains(measured, backbones, np.asarray(inverse.visual), captions.joint, captions.places(rows.caption), told),
    ]
    drawn = contact_sheet([[rows.pictures[n], *(first[name][n] for name in first)] for n in range(10)], cell=64)
    told_of = ", ".join(f"{name} {value}" for name, value in sampling.items())
    tables = [replace(each, note=f"{each.note} Sampled with {told_of}.") for each in tables]
    return Drawn(tables, drawn, ("drawing", *first))


def gains(
    measured: Measured,
    backbones: Backbones,
    visual: Float[np.ndarray, "D_image D_joint"],
    joint: Float[np.ndarray, "M D_joint"],
    truth: np.ndarray,
    told: Sequence[str],
) -> Table:
    """What each conversion gains over the paper's inverse, on the same pictures from the same noise."""
    columns = (*(f"similarity, {name}" for name in backbones.names), "agreement with the caption", "R@1")

    def values(kind: str) -> list[Float[np.ndarray, "S N"]]:
        features = measured.made[kind]
        found = [
            np.stack([cosines(each, measured.held[name][measured.chosen]) for each in features[name]])
            for name in backbones.names
        ]
        own = [each @ visual for each in features[backbones.names[0]]]
        found.append(np.stack([cosines(each, joint[truth]) for each in own]))
        # The concept's name decides nothing here, so that every caption may stand for its own.
        base = np.arange(len(joint))
        found.append(np.stack([retrieval_columns(each, joint, truth, base)["R@1"] for each in own]))
        return found

    usual = values(SD_IPC)
    rows = []
    for kind in measured.made:
        if kind not in (SD_IPC, TEXT, SHUFFLED):
            pairs = zip(values(kind), usual, strict=True)
            rows.append((f"{kind} - {SD_IPC}", tuple(Estimate.of_mean(one - other) for one, other in pairs)))
    note = (
        f"Pictures of other conversions beside those of the paper's inverse ({SD_IPC}), of the same {len(truth)} "
        f"drawings from the same noise. {'; '.join(told)}{'. ' if told else ''}95% bootstrap intervals over pictures."
    )
    return Table("conversions drawn", "What other conversions gain in pictures", note, columns, tuple(rows))
