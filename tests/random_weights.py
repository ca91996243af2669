"""Random weights that keep activations of order one, so that a wrong operation shows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from sdipc_jax.checkpoints.keys import flatten, unflatten


def random_tree(
    expected: dict[str, Any], seed: int, place: Callable[[np.ndarray, Any], Any] = lambda leaf, like: leaf
) -> dict[str, Any]:
    """Float32 leaves for a tree of shapes: kernels of variance 1 / fan-in, norms about 1, biases about 0.

    Args:
        place: makes of each leaf what the tree is to hold, given the leaf and its shape's description.
    """
    generator = np.random.default_rng(seed)

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        noise = generator.standard_normal(shape)
        if path[-1] == "kernel":
            noise /= np.sqrt(np.prod(shape[:-1]))
        elif path[-1] == "scale":
            noise = 1 + 0.2 * noise
        elif path[-1] == "bias":
            noise *= 0.2
        elif path[-1] == "logit_scale":
            noise = np.asarray(2.0)
        return noise.astype(np.float32)

    return unflatten({path: place(draw(path, like.shape), like) for path, like in flatten(expected).items()})


def random_params(module: nn.Module, *inputs: Any, seed: int = 0, **named: Any) -> dict[str, Any]:
    """Random parameters of a module that takes these inputs."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named))
    return random_tree(shapes["params"], seed)
