"""The metrics: pure functions of feature arrays on the host, in float64."""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

# Of intervals: from the 2.5th to the 97.5th percentile.
_TAILS = (2.5, 97.5)

Vectors = Float[np.ndarray, "N D"]
Interval = tuple[float, float]


def unit(x: Vectors) -> Vectors:
    """Rows of length 1; a row of zeros stays one.

    >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    x = np.asarray(x, np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def cosines(x: Vectors, y: Vectors) -> Float[np.ndarray, " N"]:
    """The cosine of each row of x with the same row of y.

    >>> cosines(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 0.0], [5.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    return np.sum(unit(x) * unit(y), axis=-1)


def ranks(scores: Float[np.ndarray, "N M"], truth: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """How many wrong columns score at least as high as the right one: 0 is found at first try.

    Ties count against the query, so that features that say nothing find nothing.

    >>> ranks(np.array([[0.1, 0.9, 0.5], [0.0, 0.0, 0.0]]), np.array([2, 0])).tolist()
    [1, 2]
    """
    own = scores[np.arange(len(truth)), truth]
    # Not `>=`: NaN, which compares false to everything, counts against the query too.
    return len(scores.T) - 1 - np.sum(scores < own[:, None], axis=1)


def recall(queries: Vectors, targets: Float[np.ndarray, "M D"], truth: Int[np.ndarray, " N"], at: int) -> float:
    """The share of queries whose target is among the `at` nearest by cosine."""
    return float(np.mean(ranks(unit(queries) @ unit(targets).T, truth) < at))


def spearman(x: Float[np.ndarray, "N K"], y: Float[np.ndarray, "N K"]) -> Float[np.ndarray, " N"]:
    """Spearman's rank correlation of each pair of rows; 0 where a row is constant, which has no trend.

    >>> spearman(np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 4.0, 0.0]])).round(6).tolist()
    [-1.0]
    """
    centred = [rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in (x, y)]
    return cosines(*centred)


def kernel_distance(x: Vectors, y: Float[np.ndarray, "M D"]) -> float:
    """KID: the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    It may be negative when the two sets are alike (Binkowski et al. 2018, eq. 4).
    """
    kernels = _Kernels(x, y)
    return kernels.distance(np.arange(len(x)), np.arange(len(y)))


def kernel_distances_of_halves(
    x: Vectors, y: Float[np.ndarray, "M D"], draws: int = 200, seed: int = 0
) -> Float[np.ndarray, " draws"]:
    """KID between random halves of both sets.

    The spread of a half's estimate over all halves is the standard error of the whole's, so the percentiles of these
    are its interval; a bootstrap would draw pictures twice and bias the distance. The halves depend on the sizes and
    the seed alone: the values of two methods on the same pictures are pairs.
    """
    kernels, rng = _Kernels(x, y), np.random.default_rng(seed)
    return np.array(
        [
            kernels.distance(*(rng.choice(count, max(2, count // 2), replace=False) for count in (len(x), len(y))))
            for _ in range(draws)
        ]
    )


class _Kernels:
    """All kernel values between and within two sets, so that subsets cost no more than reading them."""

    def __init__(self, x: Vectors, y: Float[np.ndarray, "M D"]) -> None:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        self.xx, self.yy, self.xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))

    def distance(self, rows: np.ndarray, columns: np.ndarray) -> float:
        within = 0.0
        for kernel, chosen in ((self.xx, rows), (self.yy, columns)):
            count = len(chosen)
            block = kernel[np.ix_(chosen, chosen)]
            within += (block.sum() - np.trace(block)) / (count * (count - 1))
        return float(within - 2 * self.xy[np.ix_(rows, columns)].mean())


def frechet_distance(x: Vectors, y: Float[np.ndarray, "M D"]) -> float:
    """The squared 2-Wasserstein distance of the Gaussians with the two sets' means and covariances.

    Biased upwards for few pictures: compare sets of equal size only. With A and B the centred sets, the trace of
    (S_x S_y)^(1/2) is the sum of the singular values of A B^T over ((N - 1) (M - 1))^(1/2), which is exact where
    there are fewer pictures than features and the covariances have no full rank. Where there are more, the triangles
    of their QR factors stand for A and B.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    cross = np.linalg.svd(_triangle(a) @ _triangle(b).T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    spread = np.sum(a**2) / (len(x) - 1) + np.sum(b**2) / (len(y) - 1)
    return float(np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + spread - 2 * cross)


def _triangle(x: Vectors) -> Vectors:
    """As few rows with the same products of columns."""
    return np.asarray(np.linalg.qr(x, mode="r")) if len(x) > x.shape[1] else x


def bootstrap_interval(values: Float[np.ndarray, " N"], draws: int = 2000, seed: int = 0) -> Interval:
    """The 95% interval of a mean, by the percentiles of the means of values drawn again with replacement."""
    rng = np.random.default_rng(seed)
    return percentiles(values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1))


def percentiles(values: Float[np.ndarray, " N"]) -> Interval:
    """The 2.5th and the 97.5th."""
    low, high = np.percentile(values, _TAILS)
    return float(low), float(high)
