"""Gradients through whole pictures."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdipc_jax as sdipc
from sdipc_jax import Bundle
from tests.batch_jobs import draw
from tests.tiny import SMALL_UNET, tiny_bundle

SETTINGS: dict[str, Any] = {"seeds": 3, "steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("gradients") / "parts", unet=SMALL_UNET)


@pytest.fixture(scope="module")
def context(bundle: Bundle) -> jax.Array:
    return sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a cat"]))


def test_pictures_are_the_same(bundle: Bundle, context: jax.Array) -> None:
    expected = sdipc.generate(bundle, context, **SETTINGS)
    np.testing.assert_allclose(sdipc.generate(bundle, context, differentiable=True, **SETTINGS), expected, atol=2e-6)


def test_gradient_of_a_prompt_is_that_of_finite_differences(bundle: Bundle, context: jax.Array) -> None:
    """Along directions of the whole prompt, and along the gradient itself, where it is steepest."""
    generator = np.random.default_rng(0)
    target = jnp.asarray(generator.uniform(0, 1, (1, 32, 32, 3)), jnp.float32)

    @jax.jit
    def loss(bundle: Bundle, context: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(sdipc.generate(bundle, context, differentiable=True, **SETTINGS) - target))

    gradient = np.asarray(jax.jit(jax.grad(loss, argnums=1))(bundle, context), np.float64)
    steepest = gradient / np.linalg.norm(gradient)
    for direction in (steepest, generator.standard_normal(context.shape) / 20):
        step = 0.02
        ends = [float(loss(bundle, context + sign * step * direction)) for sign in (1, -1)]
        assert np.sum(gradient * direction) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.05, abs=2e-6)


def test_a_vector_learns_a_picture(bundle: Bundle) -> None:
    """Gradient descent through generate lowers the distance to a picture that another vector has made."""
    generator = np.random.default_rng(1)
    wanted, vector = (jnp.asarray(generator.standard_normal((1, 24)), jnp.float32) for _ in range(2))

    @jax.jit
    def picture(bundle: Bundle, vector: jax.Array) -> jax.Array:
        context = sdipc.image_prompt(bundle, vector)
        return sdipc.generate(bundle, context, differentiable=True, **SETTINGS | {"guidance_scale": 1.0})

    target = picture(bundle, wanted)
    slope = jax.jit(jax.value_and_grad(lambda vector, bundle: jnp.mean((picture(bundle, vector) - target) ** 2)))
    losses = []
    for _ in range(8):
        loss, gradient = slope(vector, bundle)
        losses.append(float(loss))
        vector = vector - 0.3 * gradient / jnp.linalg.norm(gradient)
    assert losses[-1] < 0.7 * losses[0]


def test_the_program_of_the_page(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, on a checkpoint in miniature."""
    page = (Path(__file__).parents[1] / "docs/gradients.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    draw(tmp_path / "photo.jpg", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sdipc, "load", lambda name: bundle)
    names: dict[str, Any] = {}
    exec(program, names)
    assert len(names["losses"]) == 10
    assert names["losses"][-1] < names["losses"][0]
