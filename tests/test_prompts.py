"""Eqs. 4, 7 and 8, by hand where they can be written out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdipc_jax import (
    Bundle,
    InputError,
    closed_form,
    convert,
    edit_prompt,
    empty_prompt,
    image_prompt,
    text_prompt,
    tokenize,
)
from sdipc_jax.models.attention import Attention
from tests.compare import relative_error
from tests.random_weights import random_params

TEXTS = ["at night", "", "abcdefghijklmnopqr"]
# Where each of them ends; the last fills all places.
ENDS = [8, 1, 19]


@pytest.fixture(scope="module")
def vectors(tiny: Bundle) -> jax.Array:
    """Three pictures, converted, of length 27.5."""
    features = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    return convert(closed_form(tiny, scale=27.5), jnp.asarray(features))


def test_empty_prompt_is_the_encoded_empty_text(tiny: Bundle, other_pad: Bundle) -> None:
    for bundle in (tiny, other_pad):
        np.testing.assert_array_equal(empty_prompt(bundle), text_prompt(bundle, tokenize(bundle, [""])))
    # Pads are read by the text encoder, so that another pad gives other states behind the end token.
    assert relative_error(empty_prompt(other_pad)[:, :2], empty_prompt(tiny)[:, :2]) < 1e-5
    assert relative_error(empty_prompt(other_pad)[:, 2:], empty_prompt(tiny)[:, 2:]) > 0.1


def test_states_depend_on_what_came_before_alone(tiny: Bundle) -> None:
    states = text_prompt(tiny, tokenize(tiny, ["a cat", "a dog", "x"]))
    assert states.dtype == jnp.float32
    np.testing.assert_allclose(states[0, :2], states[1, :2], rtol=1e-5, atol=1e-6)
    assert relative_error(states[0, 2:5], states[1, 2:5]) > 0.1
    assert relative_error(states[1, 5], states[1, 4]) > 0.1


def test_image_prompt(tiny: Bundle, vectors: jax.Array) -> None:
    context = np.asarray(image_prompt(tiny, vectors))
    assert context.shape == (3, 20, 24)
    start = np.asarray(text_prompt(tiny, tokenize(tiny, [""])))[0, 0]
    np.testing.assert_array_equal(context[:, 0], np.stack([start] * 3))
    np.testing.assert_array_equal(context[:, 1:], np.repeat(np.asarray(vectors)[:, None], 19, axis=1))
    np.testing.assert_allclose(np.linalg.norm(context[:, 1:], axis=-1), 27.5, rtol=1e-6)
    # Whatever the text, its start state is this one.
    np.testing.assert_allclose(text_prompt(tiny, tokenize(tiny, ["a cat"]))[0, 0], start, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [20, 77])
def test_equal_tokens_are_one_with_the_logarithm_of_their_number_on_its_logit(
    tiny: Bundle, vectors: jax.Array, length: int
) -> None:
    config = dataclasses.replace(tiny.config, tokens=dataclasses.replace(tiny.config.tokens, length=length))
    text = dataclasses.replace(config.text, max_position_embeddings=length)
    params = jax.tree.map(lambda leaf: leaf, tiny.params)
    embeddings = params["text_encoder"]["text_model"]["embeddings"]
    embeddings["position_embedding"]["embedding"] = jnp.ones((length, 24))
    context = image_prompt(Bundle(params, dataclasses.replace(config, text=text)), 0.1 * vectors)
    assert context.shape == (3, length, 24)

    module = Attention(heads=2)
    x = np.random.default_rng(1).standard_normal((3, 5, 16), np.float32)
    weights = random_params(module, x, context)
    found = module.apply({"params": weights}, x, context)

    kernels = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in weights.items()}

    def heads(states: Any, name: str) -> np.ndarray:
        projected = np.asarray(states, np.float64) @ kernels[name]
        return projected.reshape(*projected.shape[:2], 2, 8).transpose(0, 2, 1, 3)

    two = context[:, :2]
    logits = heads(x, "to_q") @ heads(two, "to_k").swapaxes(2, 3) / 8**0.5 + np.array([0, np.log(length - 1)])
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    attended = (shares @ heads(two, "to_v")).transpose(0, 2, 1, 3).reshape(3, 5, 16)
    assert relative_error(found, attended @ kernels["to_out_0"] + weights["to_out_0"]["bias"]) <= 1e-5
    assert 0.01 < shares[..., 0].mean() < 0.99


def eq_8(states: Any, vectors: Any, alphas: list[float]) -> np.ndarray:
    """Written out place by place."""
    context = np.array(states)
    for n, (end, alpha) in enumerate(zip(ENDS, alphas, strict=True)):
        for place in range(end, 20):
            context[n, place] = vectors[n] + alpha * states[n, end]
    return context


@pytest.mark.parametrize("alpha", [0.9, 0, -2.0, (0.0, 0.6, 1.5)])
@pytest.mark.parametrize("pads", ["end token", "another token"])
def test_edit_prompt_by_hand(tiny: Bundle, other_pad: Bundle, vectors: jax.Array, alpha: Any, pads: str) -> None:
    bundle = tiny if pads == "end token" else other_pad
    tokens = tokenize(bundle, TEXTS)
    assert [list(row).index(513) for row in tokens] == ENDS
    alphas = list(alpha) if isinstance(alpha, tuple) else [alpha] * 3
    expected = eq_8(np.asarray(text_prompt(bundle, tokens)), np.asarray(vectors), alphas)
    given = np.array(alpha, np.float32) if isinstance(alpha, tuple) else alpha
    found = edit_prompt(bundle, vectors, tokens, given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, 0], image_prompt(bundle, vectors)[:, 0])
    # A sum that is not renormalised, the same at every place from the end on.
    np.testing.assert_array_equal(found[0, 8:], np.repeat(found[0, 8:9], 12, axis=0))
    traced = jax.jit(edit_prompt)(bundle, vectors, tokens, jnp.asarray(given, jnp.float32))
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-5)


def test_one_text_and_weight_for_all_pictures(tiny: Bundle, vectors: jax.Array) -> None:
    tokens = tokenize(tiny, ["at night"])
    found = edit_prompt(tiny, vectors, tokens, 0.9)
    several = edit_prompt(tiny, vectors, np.repeat(tokens, 3, axis=0), jnp.full(3, 0.9))
    np.testing.assert_allclose(found, several, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(edit_prompt, in_axes=(None, 0, None, None))(tiny, vectors[:, None], tokens, 0.9)
    np.testing.assert_allclose(mapped[:, 0], several, rtol=1e-5, atol=1e-5)


def test_no_text_and_no_weight_is_the_picture_alone(tiny: Bundle, other_pad: Bundle, vectors: jax.Array) -> None:
    for bundle in (tiny, other_pad):
        pictures = image_prompt(bundle, vectors)
        for texts, alpha in (([""], 0.0), (["", "", ""], np.zeros(3, np.float32))):
            np.testing.assert_array_equal(edit_prompt(bundle, vectors, tokenize(bundle, texts), alpha), pictures)


@pytest.mark.parametrize("alpha", [np.nan, np.inf, 1e39, np.array([0.5, np.nan, 0.5])])
def test_weights_that_are_not_finite_are_refused(tiny: Bundle, vectors: jax.Array, alpha: Any) -> None:
    with pytest.raises(InputError, match=r"^alpha is .*, expected a finite number"):
        edit_prompt(tiny, vectors, tokenize(tiny, ["x"]), alpha)


@pytest.mark.parametrize("texts, alpha", [(2, 0.9), (1, np.ones(2)), (3, np.ones(2)), (1, np.ones((3, 1)))])
def test_counts_that_differ_are_refused(tiny: Bundle, vectors: jax.Array, texts: int, alpha: Any) -> None:
    with pytest.raises(InputError, match=rf"^there are 3 pictures, {texts} texts and alpha of shape .*, expected as"):
        edit_prompt(tiny, vectors, tokenize(tiny, ["x"] * texts), alpha)
