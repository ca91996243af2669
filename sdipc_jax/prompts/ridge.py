"""The general closed form: a linear map from a CLIP's joint space to the states that a UNet reads, from captions alone.

With w the captions' joint vectors at unit length and h their states, w0 and h0 the means of both, C = Cov(w) over D
dimensions and l the ridge,

    B = (C + l tr(C) / D I)^-1 Cov(w, h)
    h(u) = s (h0 + (u - w0) B) / |h0 + (u - w0) B|        s the mean of |h| over the captions

for the joint vector u of a picture, at unit length too. Pictures and captions lie apart in the joint space; with the
mean u0 of many pictures, u - u0 stands in the place of u - w0 (the mean shift). Without a ridge, and with states of
which the joint vectors are a linear image, B is the inverse of eq. 6. All in float64.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Vectors = Float[np.ndarray, "N D"]
# Variances below this share of the largest are what float32 makes of 0: their inverse would be noise, enlarged.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class RidgeMap:
    """A fitted map.

    Attributes:
        matrix: B, one for each place of a prompt.
        intercept: h0, likewise.
        length: s, of each part of a state, likewise.
        centre: w0.
        axes: the principal axes of the captions' joint vectors, a column each.
        deviations: their standard deviation along each, largest first.
        rank: along how many of them a deviation counts for more than half; the ridge decides.
    """

    matrix: Float[np.ndarray, "places D_joint D_text"]
    intercept: Float[np.ndarray, "places D_text"]
    length: Float[np.ndarray, "places parts"]
    centre: Float[np.ndarray, " D_joint"]
    axes: Float[np.ndarray, "D_joint D_joint"]
    deviations: Float[np.ndarray, " D_joint"]
    rank: int

    def __call__(self, joint: Vectors, place: int = 0) -> Vectors:
        """h0 + (u - w0) B, before it gets its length."""
        return self.intercept[place] + (unit(joint) - self.centre) @ self.matrix[place]

    def outside(self, joint: Vectors) -> Float[np.ndarray, " N"]:
        """The share of a vector's squared distance from the captions' mean that lies along axes that are not kept."""
        along = (unit(joint) - self.centre) @ self.axes
        return np.sum(along[:, self.rank :] ** 2, axis=1) / np.sum(along**2, axis=1)


def fit(
    joint: Vectors, states: Float[np.ndarray, "N places D_text"], ridge: float, widths: tuple[int, ...] = ()
) -> RidgeMap:
    """Fits the map.

    Args:
        joint: the captions' vectors in the joint space, of any length.
        states: theirs, one for each place.
        ridge: l.
        widths: of the parts of a state that have a length each; none: it is one.
    """
    w = unit(joint)
    centre = w.mean(axis=0)
    centred = w - centre
    variances, axes = np.linalg.eigh(centred.T @ centred / len(w))
    variances, axes = np.maximum(variances[::-1], 0), axes[:, ::-1]
    level = ridge * variances.mean()
    kept = variances + level > _ROUNDING * variances[0]
    reciprocal = np.where(kept, 1 / np.where(kept, variances + level, 1), 0)
    # What the centred vectors sum up to is 0, so that the states need not be centred.
    weights = (axes * reciprocal) @ axes.T @ centred.T / len(w)
    places = [states[:, place].astype(np.float64) for place in range(states.shape[1])]
    return RidgeMap(
        matrix=np.stack([weights @ each for each in places]),
        intercept=np.stack([each.mean(axis=0) for each in places]),
        length=np.stack([[np.linalg.norm(p, axis=1).mean() for p in parts_of(each, widths)] for each in places]),
        centre=centre,
        axes=axes,
        deviations=np.sqrt(variances),
        rank=int(np.sum(kept & (variances >= level))),
    )


def unit(vectors: Float[np.ndarray, "*N D"]) -> Float[np.ndarray, "*N D"]:
    """The vectors at length 1, in float64.

    >>> unit(np.array([[3.0, 4.0]])).tolist()
    [[0.6, 0.8]]
    """
    exact = np.asarray(vectors, np.float64)
    return exact / np.linalg.norm(exact, axis=-1, keepdims=True)


def parts_of(states: Vectors, widths: tuple[int, ...]) -> list[Vectors]:
    """The parts that each have a length of their own; the whole, if there are no widths."""
    return np.split(states, np.cumsum(widths)[:-1], axis=1) if widths else [states]


def explained(found: Vectors, states: Vectors) -> float:
    """R^2: the share of the states' variance that is found; below 0 if their mean would be nearer.

    >>> explained(np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]]))
    0.5
    """
    exact = np.asarray(states, np.float64)
    left = np.sum((exact - found) ** 2)
    return float(1 - left / np.sum((exact - exact.mean(axis=0)) ** 2))
