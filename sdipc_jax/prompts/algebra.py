"""Pictures' vectors are vectors of the space of texts: means, ways from one to another, and what is taken out of them.

All functions are pure and take and give rows (N, D). Lengths matter to the UNet, which has only seen states about as
long as a text's: `with_length` gives them back what a mean of unlike vectors loses.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.errors import InputError
from sdipc_jax.models.layers import precision

# Singular values below this share of the largest are rounding: such directions add nothing to a span.
_ROUNDING = 1e-5

Rows = Float[Array | np.ndarray, "N D"]


def mean(vectors: Rows, weights: Any = None) -> Float[Array, "1 D"]:
    """The weighted mean, which is shorter than what it is the mean of: see `mean_direction`.

    Args:
        weights: (N,), of any sign; equal ones if None.

    Raises:
        InputError: another number of weights, or on the host a sum of 0.

    >>> mean(np.array([[1.0, 0.0], [0.0, 1.0]]), [3, 1]).tolist()
    [[0.75, 0.25]]
    """
    weights = np.ones(len(vectors)) if weights is None else weights
    check_weights(len(vectors), weights)
    weights = jnp.asarray(weights, jnp.float32)
    total = jnp.matmul(weights[None], jnp.asarray(vectors, jnp.float32), precision=precision(jnp.float32))
    return total / jnp.sum(weights)


def check_weights(count: int, weights: Any) -> None:
    """Refuses weights that no mean can be made with; those on a device are taken as they are.

    Raises:
        InputError: not one for each of `count` vectors, or a sum of 0.
    """
    if np.shape(weights) != (count,):
        raise InputError(f"weights have shape {np.shape(weights)}, expected ({count},): one for each vector")
    if not isinstance(weights, jax.Array) and not abs(np.sum(weights)) > 1e-6 * np.sum(np.abs(weights)):
        raise InputError(f"weights are {list(weights)}, expected a sum that is not 0: correct them")


def mean_direction(vectors: Rows, weights: Any, length: Any) -> Float[Array, "1 D"]:
    """The weighted mean, given a length: that of the prompts, `projection.scale`."""
    return with_length(mean(vectors, weights), length)


def with_length(vectors: Rows, length: Any) -> Float[Array, "N D"]:
    """The same directions, as long as asked for.

    >>> with_length(np.array([[3.0, 4.0]]), 10).tolist()
    [[6.0, 8.0]]
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    return length * vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def slerp(first: Rows, second: Rows, share: Any) -> Float[Array, "N D"]:
    """The way from one vector to another along the arc between their directions (Shoemake 1985).

    Lengths go from one to the other evenly, so that equal ones stay what they are. Rows and shares broadcast: one pair
    and F shares give F rows.

    Args:
        share: of the way, 0 to 1, a number or (N,).

    >>> np.round(np.asarray(slerp(np.array([[2.0, 0.0]]), np.array([[0.0, 2.0]]), 0.5), float), 4).tolist()
    [[1.4142, 1.4142]]
    """
    first, second = jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)
    share = jnp.asarray(share, jnp.float32).reshape(-1, 1)
    lengths = [jnp.linalg.norm(each, axis=-1, keepdims=True) for each in (first, second)]
    a, b = first / lengths[0], second / lengths[1]
    # Of the half chords, which is exact where the cosine rounds to 1.
    angle = 2 * jnp.arctan2(
        jnp.linalg.norm(a - b, axis=-1, keepdims=True), jnp.linalg.norm(a + b, axis=-1, keepdims=True)
    )
    sine = jnp.sin(angle)
    straight = sine < 1e-4
    safe = jnp.where(straight, 1, sine)
    direction = jnp.where(
        straight,
        (1 - share) * a + share * b,
        (jnp.sin((1 - share) * angle) * a + jnp.sin(share * angle) * b) / safe,
    )
    return ((1 - share) * lengths[0] + share * lengths[1]) * direction


def analogy(vectors: Rows, minus: Rows, plus: Rows) -> Float[Array, "N D"]:
    """vectors - minus + plus: as `plus` is to `minus`, so is the result to `vectors`."""
    return jnp.asarray(vectors, jnp.float32) - jnp.asarray(minus) + jnp.asarray(plus)


def project_out(vectors: Rows, directions: Float[Any, "K D"]) -> Float[Array, "N D"]:
    """What is left of vectors without their part in the span of directions; it has the cosine 0 to each of them.

    >>> project_out(np.array([[1.0, 2.0, 3.0]]), np.array([[0.0, 2.0, 0.0]])).tolist()
    [[1.0, 0.0, 3.0]]
    """
    return jnp.asarray(vectors, jnp.float32) - keep(vectors, directions)


def keep(vectors: Rows, directions: Float[Any, "K D"]) -> Float[Array, "N D"]:
    """The part of vectors in the span of directions, which may depend on each other.

    >>> keep(np.array([[1.0, 2.0, 3.0]]), np.array([[0.0, 2.0, 0.0], [0.0, 4.0, 0.0]])).tolist()
    [[0.0, 2.0, 0.0]]
    """
    _, values, basis = jnp.linalg.svd(jnp.asarray(directions, jnp.float32), full_matrices=False)
    basis = jnp.where((values > _ROUNDING * values[0])[:, None], basis, 0)
    exact = precision(jnp.float32)
    inside = jnp.matmul(jnp.asarray(vectors, jnp.float32), basis.T, precision=exact)
    return jnp.matmul(inside, basis, precision=exact)


def share_kept(vectors: Rows, kept: Rows) -> Float[Array, " N"]:
    """|kept|^2 / |vectors|^2: how much of each vector a projection has left.

    >>> share_kept(np.array([[2.0, 2.0]]), np.array([[2.0, 0.0]])).tolist()
    [0.5]
    """
    return jnp.sum(jnp.square(kept), axis=-1) / jnp.sum(jnp.square(jnp.asarray(vectors)), axis=-1)
