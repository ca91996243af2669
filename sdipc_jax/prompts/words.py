"""Pictures and words in CLIP's joint space: the nearest words, sparse mixes of words, what tells two pictures apart.

A picture's vector there is its features times the visual projection, a text's the end token's state times the text
projection. Where pictures and texts lie around different means, the means are taken away first (SpLiCE: Bhalla et al.
2024, arXiv 2402.10376, section 4).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from sdipc_jax.checkpoints.text_tower import TextTower
from sdipc_jax.errors import InputError
from sdipc_jax.prompts.calibration import caption_vectors
from sdipc_jax.prompts.ridge import unit

# A word stands for the mean of what it is in these.
TEMPLATES = ("{}", "a photo of {}", "a drawing of {}")
_ROUNDING = 1e-9
# Vectors compared with all words at once.
_AT_ONCE = 1024

Vectors = Float[np.ndarray, "N D_joint"]
Centre = Float[np.ndarray, " D_joint"] | float


@dataclass(frozen=True)
class Bank:
    """Words and their vectors.

    Attributes:
        words: W of them.
        vectors: (W, D_joint), of length 1.
    """

    words: tuple[str, ...]
    vectors: Vectors

    @property
    def centre(self) -> Float[np.ndarray, " D_joint"]:
        """The mean of the words' vectors: what all texts share."""
        return self.vectors.mean(axis=0)


@dataclass(frozen=True)
class Mix:
    """A vector as a sum of a few words with weights above 0.

    Attributes:
        words: with their weights, the largest first; together they give the part of the vector that they explain.
        residual: |vector - sum|^2 / |vector|^2, 0 to 1.
    """

    words: tuple[tuple[str, float], ...]
    residual: float


def encode_words(tower: TextTower, words: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Bank:
    """The vectors of words, each the mean of the templates' vectors of length 1.

    Raises:
        InputError: there are no words or no templates, or a template without a place for the word.
    """
    if isinstance(words, str) or not words:
        raise InputError(f"words is {words!r}, expected a list of at least one")
    if not templates or any("{}" not in each for each in templates):
        raise InputError(f"templates are {list(templates)}, expected at least one, each with {{}} for the word")
    texts = [template.format(word) for template in templates for word in words]
    vectors = unit(caption_vectors(tower, texts)).reshape(len(templates), len(words), -1)
    return Bank(tuple(words), unit(vectors.mean(axis=0)))


def nearest(bank: Bank, vectors: Vectors, top: int) -> list[list[tuple[str, float]]]:
    """For each vector the words with the largest cosines, the largest first.

    >>> bank = Bank(("up", "right"), np.array([[0.0, 1.0], [1.0, 0.0]]))
    >>> nearest(bank, np.array([[3.0, 4.0]]), 1)
    [[('up', 0.8)]]
    """
    scores = unit(np.asarray(vectors, np.float64)) @ bank.vectors.T
    return [[(bank.words[place], float(row[place])) for place in _largest(row, top)] for row in scores]


def mixes_of(
    bank: Bank,
    vectors: Vectors,
    most: int,
    *,
    words_centre: Centre = 0.0,
    pictures_centre: Centre = 0.0,
) -> list[Mix]:
    """Each vector as a sum of at most so many words, with weights of 0 or more.

    The word that points most along what is left is added, and all weights are fitted again (orthogonal matching
    pursuit), until there are as many as asked for or none would lessen what is left.

    Args:
        words_centre, pictures_centre: what is taken from the words' and from the vectors at length 1.

    >>> bank = Bank(("up", "right", "left"), np.array([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]))
    >>> (mix,) = mixes_of(bank, np.array([[3.0, 4.0]]), 2)
    >>> [(word, round(weight, 6)) for word, weight in mix.words], round(mix.residual, 6)
    ([('up', 0.8), ('right', 0.6)], 0.0)
    """
    targets = centred(np.asarray(vectors, np.float64), pictures_centre)
    atoms = centred(bank.vectors, words_centre)
    parts = (targets[first : first + _AT_ONCE] for first in range(0, len(targets), _AT_ONCE))
    return [_mix(bank, *found) for part in parts for found in _pursuit(atoms, part, min(most, len(atoms)))]


def _pursuit(
    atoms: Vectors, targets: Vectors, most: int
) -> Iterator[tuple[list[int], Float[np.ndarray, " K"], Float[np.ndarray, " D_joint"]]]:
    """For each target the atoms that are chosen, their weights, and what is left of it."""
    chosen: list[list[int]] = [[] for _ in targets]
    weights = [np.zeros(0) for _ in targets]
    left, going = targets.copy(), list(range(len(targets)))
    for _ in range(most):
        gains = left[going] @ atoms.T
        for row, place in zip(gains, list(going), strict=True):
            row[chosen[place]] = -np.inf
            best = int(np.argmax(row))
            if row[best] <= _ROUNDING:
                going.remove(place)
                continue
            chosen[place].append(best)
            weights[place] = nnls(atoms[chosen[place]].T, targets[place])[0]
            left[place] = targets[place] - weights[place] @ atoms[chosen[place]]
    return zip(chosen, weights, left, strict=True)


def _mix(bank: Bank, chosen: list[int], weights: Float[np.ndarray, " K"], left: Float[np.ndarray, " D_joint"]) -> Mix:
    found = [(bank.words[chosen[place]], float(weights[place])) for place in _largest(weights, len(chosen))]
    return Mix(tuple(each for each in found if each[1] > 0), float(left @ left))


def difference(
    bank: Bank, before: Float[np.ndarray, " D_joint"], after: Float[np.ndarray, " D_joint"], top: int
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The words that point most from one picture to another, and those that point most back, with their cosines.

    Only what sets a word apart from all others counts.

    Raises:
        InputError: the pictures have the same vector.
    """
    step = unit(np.asarray(after, np.float64)[None]) - unit(np.asarray(before, np.float64)[None])
    if not np.linalg.norm(step) > _ROUNDING:
        raise InputError("found two pictures with the same vector, expected two that differ: name another")
    scored = Bank(bank.words, centred(bank.vectors, bank.centre))
    (gained,), (lost,) = nearest(scored, step, top), nearest(scored, -step, top)
    return gained, lost


def centred(vectors: Vectors, centre: Centre) -> Vectors:
    """The vectors at length 1, without the centre, at length 1 again; one that is the centre becomes 0.

    >>> centred(np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([1.0, 0.0])).round(4).tolist()
    [[-0.7071, 0.7071], [0.0, 0.0]]
    """
    apart = unit(vectors) - centre
    length = np.linalg.norm(apart, axis=-1, keepdims=True)
    return apart / np.where(length > _ROUNDING, length, 1)


def _largest(values: Float[np.ndarray, " N"], count: int) -> list[int]:
    return np.argsort(-values, kind="stable")[:count].tolist()
