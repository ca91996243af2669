"""Winograd's convolutions for CPUs: 3x3 kernels with 2.25 or 4 times fewer multiplications (Lavin and Gray 2016).

A tile of m x m results is A^T [(G w G^T) * (B^T x B)] A of the kernel w and the (m + 2) x (m + 2) inputs x that it
reads (their eq. 8). The product in the middle is one matrix product over channels for each of the (m + 2)^2 places.
G w G^T holds more numbers than w and does not change: `transformed` computes it once, and convolutions find it in a
collection of variables of its own. Where there is none they are plain.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sdipc_jax.tracing import platform

COLLECTION = "winograd"

# With fewer channels the transforms take more than the product saves; so they do with fewer pixels, whose product has
# to read more numbers of kernels than of pictures. At 16 x 16, tiles of four are quicker for many pictures alone, in
# 2.25 times the memory.
_CHANNELS = 256
_SIDES = {4: 24, 2: 12}
# Of more tiles the transforms take more memory than a network does without them: they go strip by strip.
_TILES = 1024

# Lavin and Gray's matrices by m, for the points 0, 1, -1 and infinity, and 2 and -2 besides (their sections 4.1, 4.3).
_INPUT = {
    2: np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    4: np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    ),
}
_KERNEL = {
    2: np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2,
    4: np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
}
_OUTPUT = {
    2: np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    4: np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
}


def transformed(model: nn.Module, params: Any, *inputs: Any, method: str = "__call__", **named: Any) -> Any:
    """The kernels of a network's convolutions that are quicker in this form, G w G^T, for inputs of these shapes.

    Under `jit` nothing else of the network is computed. Nothing is transformed but on CPUs and in float32.

    Returns:
        A tree to pass to the network as the collection `COLLECTION`, empty if no convolution gains.
    """
    # Most small networks have no such convolution: they need not be traced to be told.
    if platform() != "cpu" or not any(map(gains, jax.tree.leaves(params))):
        return {}
    _, found = model.apply({"params": params}, *inputs, method=method, mutable=[COLLECTION], **named)
    return found.get(COLLECTION, {})


def transform_kernel(kernel: Float[Array, "3 3 C D"], height: int, width: int) -> Float[Array, "places C D"] | None:
    """G w G^T for inputs of this size; None where a plain convolution is as quick."""
    tile = next((tile for tile, side in _SIDES.items() if min(height, width) >= side), None)
    return None if tile is None or not gains(kernel) else in_tiles(kernel, tile)


def in_tiles(kernel: Float[Array, "3 3 C D"], tile: int) -> Float[Array, "places C D"]:
    """G w G^T for tiles of 2 x 2 or 4 x 4 results."""
    both = jnp.asarray(np.kron(_KERNEL[tile], _KERNEL[tile]), jnp.float32)
    return jnp.einsum("pk,kcd->pcd", both, kernel.reshape(9, *kernel.shape[2:]), precision=jax.lax.Precision.HIGHEST)


def gains(kernel: Any) -> bool:
    """Whether a kernel is quicker in this form for large enough inputs."""
    fits = kernel.ndim == 4 and kernel.shape[:2] == (3, 3) and kernel.dtype == jnp.float32
    return fits and min(kernel.shape[2:]) >= _CHANNELS


def convolve(x: Float[Array, "N h w C"], kernel: Float[Array, "places C D"]) -> Float[Array, "N h w D"]:
    """A convolution of stride 1, padded by 1, with a kernel from `transform_kernel`."""
    count, height, width, _ = x.shape
    tile = round(len(kernel) ** 0.5) - 2
    down, across = -(-height // tile), -(-width // tile)
    strips = -(-down // max(1, _TILES // (count * across)))
    rows = -(-down // strips)
    below, right = strips * rows * tile - height, across * tile - width
    x = jnp.pad(x, ((0, 0), (1, 1 + below), (1, 1 + right), (0, 0)))

    def fill(strip: Any, result: Float[Array, "N h2 w2 D"]) -> Float[Array, "N h2 w2 D"]:
        first = strip * rows * tile
        part = jax.lax.dynamic_slice_in_dim(x, first, rows * tile + 2, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(result, _convolve_tiles(part, kernel), first, axis=1)

    if strips == 1:
        result = _convolve_tiles(x, kernel)
    else:
        # Not zeros: XLA would keep those of all convolutions from the network's beginning.
        empty = jnp.broadcast_to(x[:, 1:2, 1:2, :1], (count, strips * rows * tile, across * tile, kernel.shape[2]))
        result = jax.lax.fori_loop(0, strips, fill, empty)
    return result[:, :height, :width]


def _convolve_tiles(x: Float[Array, "N h w C"], kernel: Float[Array, "places C D"]) -> Float[Array, "N h2 w2 D"]:
    """`convolve` of whole tiles, whose padding is there already."""
    count, height, width, channels = x.shape
    side = round(len(kernel) ** 0.5)
    tile = side - 2
    down, across = (height - 2) // tile, (width - 2) // tile
    # Pixel (i, j) of all tiles at once, wherever they lie.
    rows = [x[:, i : i + (down - 1) * tile + 1 : tile] for i in range(side)]
    places = []
    for row in _combine(_INPUT[tile], rows):
        columns = [row[:, :, j : j + (across - 1) * tile + 1 : tile] for j in range(side)]
        places += _combine(_INPUT[tile], columns)
    inputs = jnp.stack(places).reshape(side * side, -1, channels)
    products = jnp.matmul(inputs, kernel, precision=jax.lax.Precision.HIGHEST)
    products = products.reshape(side, side, count, down, across, -1)
    columns = [jnp.stack(_combine(_OUTPUT[tile], list(row)), axis=3) for row in products]
    result = jnp.stack(_combine(_OUTPUT[tile], columns), axis=2)
    return result.reshape(count, down * tile, across * tile, -1)


def _combine(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """The matrix times a column of arrays, without the products with 0 and 1."""

    def term(factor: float, part: Array) -> Array:
        return part if factor == 1 else float(factor) * part

    sums = []
    for row in matrix:
        first, *rest = [term(factor, part) for factor, part in zip(row, parts, strict=True) if factor != 0]
        sums.append(sum(rest, start=first))
    return sums
