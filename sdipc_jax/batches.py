"""Rows in batches of one shape, so that a program is compiled once."""

from collections.abc import Callable
from math import ceil
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Tree = TypeVar("Tree")


def pad(tree: Tree, multiple: int) -> Tree:
    """Repeats the last row of arrays (N, ...) until `multiple` divides their number; the caller cuts them off again.

    >>> pad(np.array([1, 2, 3]), 4)
    array([1, 2, 3, 3])
    """

    def fill(leaf: Any) -> Any:
        count = len(leaf)
        return leaf[np.minimum(np.arange(-(-count // multiple) * multiple), count - 1)] if count % multiple else leaf

    return jax.tree.map(fill, tree)


def in_equal_parts(x: Array, most: int, axis: int = 0) -> Array:
    """An axis of any length as two, (parts, size): as few parts of at most `most` as hold all, filled up with zeros.

    >>> in_equal_parts(jnp.arange(1, 6), 4).tolist()
    [[1, 2, 3], [4, 5, 0]]
    """
    count = x.shape[axis]
    parts = ceil(count / most)
    size = ceil(count / parts)
    padded = jnp.pad(x, [(0, parts * size - count if each == axis else 0) for each in range(x.ndim)])
    return padded.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :])


def in_batches(function: Callable[..., Any], *arrays: np.ndarray, size: int = 64) -> Any:
    """A function of rows over any number of rows, on the host; the last batch is filled up, and cut off again.

    Args:
        function: of as many arrays (size, ...), to a tree of arrays (size, ...).
        arrays: (N, ...), at least one row.

    >>> in_batches(lambda x: 2 * x, np.arange(5), size=2).tolist()
    [0, 2, 4, 6, 8]
    """
    count = len(arrays[0])
    results = []
    for first in range(0, count, size):
        rows = (pad(array[first : first + size], size) for array in arrays)
        results.append(jax.tree.map(np.asarray, function(*rows)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)
