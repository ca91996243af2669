"""Features in, the rows of the paper's Tables 1 to 6 out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from sdipc_jax.evaluate.metrics import (
    frechet_distance,
    kernel_distance,
    kernel_distances_of_halves,
    percentiles,
    ranks,
    unit,
)
from sdipc_jax.evaluate.tables import Estimate

Vectors = Float[np.ndarray, "N D"]
Cells = dict[str, Estimate | None]
Hits = dict[str, Float[np.ndarray, " N"]]
# From some of the queries to which targets are right.
_Right = Callable[[Int[np.ndarray, " n"]], Bool[np.ndarray, "n M"]]

# Rows of scores that are in memory at once.
_ROWS = 2048
# As the paper gives them.
_PERCENT, _THOUSAND = 100.0, 1000.0


@dataclass(frozen=True)
class Subjects:
    """What generated pictures are compared with.

    Attributes:
        references: for each generated picture, the rows of the real ones that it should be like.
        texts: what it should show.
        groups: pictures of one group count together: intervals are over groups.
    """

    references: Sequence[Int[np.ndarray, " R"]]
    texts: Sequence[str]
    groups: Shaped[np.ndarray, " N"]


@dataclass(frozen=True)
class Seen:
    """A set of pictures as each judge sees it."""

    clip: Vectors
    dino: Vectors | None
    inception: Vectors | None


def likeness(real: Seen, made: Seen, subjects: Subjects, texts: Vectors) -> Cells:
    """DINO, CLIP-I and CLIP-T in percent.

    Args:
        texts: features of the subjects' texts.
    """
    found: Cells = {"DINO": None}
    if real.dino is not None and made.dino is not None:
        found["DINO"] = _grouped(_to_references(made.dino, real.dino, subjects.references), subjects.groups)
    found["CLIP-I"] = _grouped(_to_references(made.clip, real.clip, subjects.references), subjects.groups)
    found["CLIP-T"] = _grouped(np.sum(unit(made.clip) * unit(texts), axis=1), subjects.groups)
    return found


def distances(real: Seen, made: Seen) -> Cells:
    """FID, and KID in thousandths with an interval from random halves; None without Inception."""
    if real.inception is None or made.inception is None:
        return {"FID": None, "KID x 1000": None}
    kid = kernel_distance(made.inception, real.inception)
    low, high = percentiles(kernel_distances_of_halves(made.inception, real.inception))
    return {
        "FID": Estimate(frechet_distance(made.inception, real.inception)),
        "KID x 1000": Estimate(_THOUSAND * kid, (_THOUSAND * low, _THOUSAND * high)),
    }


def classified(found: Vectors, classes: Float[np.ndarray, "M D"], truth: Int[np.ndarray, " N"]) -> Hits:
    """Whether each picture's class is nearest, and among the five nearest."""
    return _at(("Acc@1", "Acc@5"), found, classes, lambda part: truth[part][:, None] == np.arange(len(classes)))


def retrieved(pictures: Vectors, captions: Float[np.ndarray, "M D"], owner: Int[np.ndarray, " M"]) -> tuple[Hits, Hits]:
    """Whether one of a picture's captions is nearest to it or among five (TR), and its picture to a caption (IR).

    Args:
        owner: of each caption, the row of its picture.
    """
    rows = np.arange(len(pictures))
    texts = _at(("TR@1", "TR@5"), pictures, captions, lambda part: owner[None, :] == rows[part][:, None])
    images = _at(("IR@1", "IR@5"), captions, pictures, lambda part: owner[part][:, None] == rows[None, :])
    return texts, images


def in_percent(hits: Iterable[Hits]) -> Cells:
    """Means with bootstrap intervals."""
    found: Cells = {}
    for each in hits:
        found |= {name: Estimate.of_mean(_PERCENT * values[None]) for name, values in each.items()}
    return found


def _at(names: tuple[str, str], queries: Vectors, targets: Vectors, right: _Right) -> Hits:
    """Whether a right target is nearest, and among the five nearest; wrong ones win ties."""
    queries, targets = unit(queries), unit(targets)
    place = np.zeros(len(queries), int)
    for first in range(0, len(queries), _ROWS):
        part = np.arange(first, min(first + _ROWS, len(queries)))
        scores, fitting = queries[part] @ targets.T, right(part)
        best = np.where(fitting, scores, -np.inf).max(axis=1)
        # The best right one in a column of its own, against all wrong ones.
        wrong = np.where(fitting, -np.inf, scores)
        place[part] = ranks(np.concatenate([best[:, None], wrong], axis=1), np.zeros(len(part), int))
    return {names[0]: (place < 1) * 1.0, names[1]: (place < 5) * 1.0}


def _to_references(
    made: Vectors, real: Float[np.ndarray, "M D"], references: Sequence[Int[np.ndarray, " R"]]
) -> Float[np.ndarray, " N"]:
    """Each picture's mean cosine with its references."""
    made, real = unit(made), unit(real)
    return np.array([np.mean(real[rows] @ each) for each, rows in zip(made, references, strict=True)])


def _grouped(values: Float[np.ndarray, " N"], groups: Shaped[np.ndarray, " N"]) -> Estimate:
    """The mean over groups of each group's mean, in percent."""
    _, of = np.unique(groups, return_inverse=True)
    means = np.bincount(of, values) / np.bincount(of)
    return Estimate.of_mean(_PERCENT * means[None])
