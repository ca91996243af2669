"""Layers whose parameters are given: nothing is drawn where they are there, and what is drawn is what Flax draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sdipc_jax.models.given import Dense, Embed, LayerNorm, shapes
from sdipc_jax.models.layers import Conv, GroupNorm

LAYERS: dict[str, tuple[nn.Module, nn.Module, Any]] = {
    "dense": (Dense(3), nn.Dense(3), jnp.ones((2, 4))),
    "norm": (LayerNorm(), nn.LayerNorm(), jnp.ones((2, 4))),
    "embedding": (Embed(5, 3), nn.Embed(5, 3), jnp.arange(4)),
    "convolution": (Conv(3, (3, 3)), nn.Conv(3, (3, 3)), jnp.ones((1, 4, 4, 2))),
}


@pytest.mark.parametrize("ours, flax, x", LAYERS.values(), ids=LAYERS)
def test_what_is_drawn_is_what_flax_draws(ours: nn.Module, flax: nn.Module, x: Any) -> None:
    found, expected = ours.init(jax.random.key(3), x), flax.init(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(ours.apply(found, x), flax.apply(expected, x))


def test_nothing_is_drawn_for_parameters_that_are_there() -> None:
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        raise AssertionError("drawn")

    x, layer = jnp.ones((2, 4)), Dense(3, kernel_init=draw)
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    np.testing.assert_array_equal(layer.apply({"params": params}, x), np.full((2, 3), 4.0))
    with pytest.raises(AssertionError, match="drawn"):
        layer.init(jax.random.key(0), x)
    assert shapes(layer, ((2, 4), jnp.float32)) == jax.eval_shape(lambda: params)


def test_shapes_are_nobodys_to_change() -> None:
    first = shapes(GroupNorm(2, 1e-5), ((1, 2, 2, 4), jnp.float32))
    first.pop("scale")
    assert set(shapes(GroupNorm(2, 1e-5), ((1, 2, 2, 4), jnp.float32))) == {"scale", "bias"}
