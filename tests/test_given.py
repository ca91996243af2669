"""Layers whose parameters are given: nothing is drawn where they are there, and what is drawn is what Flax draws."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sdipc_jax.models import CLIPVisionConfig, CLIPVisionModel, given
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


def test_shapes_are_remembered_beside_compiled_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a second process, which an empty memory stands for here, no network is traced; what is damaged is no harm."""
    config = CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=7)
    network, inputs = CLIPVisionModel(config), ((1, 28, 28, 3), jnp.float32)
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    traced: list[Any] = []
    trace = jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda *arguments: traced.append(arguments) or trace(*arguments))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        found = []
        for damage in (None, None, b"{}", b"[1", None):
            for file in tmp_path.iterdir():
                file.write_bytes(damage if damage is not None else file.read_bytes())
            given._shapes.cache_clear()
            found.append((shapes(network, inputs), len(traced)))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert [count for _, count in found] == [1, 1, 2, 3, 3]
    key = jax.random.key(0)
    expected = trace(network.init, key, jnp.zeros(inputs[0]))["params"]
    assert all(tree == expected for tree, _ in found)
