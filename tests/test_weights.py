"""Several prompts for one picture, with weights that differ by layer, step and place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdipc_jax import Bundle, InputError, generate, parallel
from sdipc_jax.models.attention import Attention
from sdipc_jax.models.weighted import LayerContexts, WeightedContexts, cross_attention_layers
from sdipc_jax.sampling import weights as w
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from tests.random_weights import random_params
from tests.tiny import tiny_bundle

SETTINGS: dict[str, Any] = {"steps": 3, "sampler": "ddim", "guidance_scale": 4.0}
COUNT, PROMPTS, STEPS = 4, 3, 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Layers of cross-attention at both ends and in the middle, on grids of two sizes."""
    return tiny_bundle(tmp_path_factory.mktemp("weights") / "parts")


@pytest.fixture(scope="module")
def contexts(bundle: Bundle) -> jax.Array:
    shape = COUNT, PROMPTS, bundle.config.tokens.length, bundle.config.unet.cross_attention_dim
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def several(bundle: Bundle) -> np.ndarray:
    """Weights in which everything differs."""
    layers = len(cross_attention_layers(bundle.config.unet))
    return np.random.default_rng(1).uniform(0, 1, (COUNT, PROMPTS, layers, STEPS, 8, 8)).astype(np.float32)


def test_a_layer_adds_what_each_prompt_gives() -> None:
    """Against attention written out in float64, with a weight for each pixel."""
    generator = np.random.default_rng(2)
    x, prompts = generator.standard_normal((2, 4, 6)), generator.standard_normal((2, 3, 5, 7))
    weights = generator.uniform(0, 1, (2, 3, 4))
    layer = Attention(heads=2)
    params = random_params(layer, jnp.asarray(x, jnp.float32), jnp.asarray(prompts[:, 0], jnp.float32))
    q, k, v, out = (np.asarray(params[name]["kernel"], np.float64) for name in ("to_q", "to_k", "to_v", "to_out_0"))
    expected = np.zeros((2, 4, 6))
    for n, r in np.ndindex(2, 3):
        heads = [slice(0, 3), slice(3, 6)]
        attended = []
        for head in heads:
            scores = (x[n] @ q[:, head]) @ (prompts[n, r] @ k[:, head]).T / np.sqrt(3)
            softmax = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            attended.append(softmax @ (prompts[n, r] @ v[:, head]))
        expected[n] += weights[n, r][:, None] * np.concatenate(attended, axis=1)
    expected = expected @ out + np.asarray(params["to_out_0"]["bias"], np.float64)
    context = LayerContexts(jnp.asarray(prompts, jnp.float32), jnp.asarray(weights, jnp.float32))
    found = layer.apply({"params": params}, jnp.asarray(x, jnp.float32), context)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_masks_have_the_size_of_each_layer() -> None:
    paths = (("down_blocks_0", "attentions_0"), ("mid_block", "attentions_0"))
    weights = np.zeros((1, 1, 2, 4, 4), np.float32)
    weights[0, 0, 0] = [[0, 0, 1, 1]] * 4
    weights[0, 0, 1] = 5
    contexts = WeightedContexts(jnp.zeros((1, 1, 2, 3)), jnp.asarray(weights), paths)
    # A triangle two pixels wide about each centre, cut off at the edge: (3 * 0 + 3 * 0 + 1 * 1) / 7.
    np.testing.assert_allclose(contexts.at(paths[0], 2, 2).weights[0, 0], np.array([1, 6, 1, 6]) / 7, rtol=1e-6)
    assert contexts.at(paths[0], 4, 4).weights.tolist() == [[[0, 0, 1, 1] * 4]]
    np.testing.assert_allclose(contexts.at(paths[1], 3, 5).weights, np.full((1, 1, 15), 5))
    everywhere = dataclasses.replace(contexts, weights=jnp.full((1, 1, 1, 1, 1), 2.0))
    assert everywhere.at(paths[1], 1, 3).weights.tolist() == [[[2, 2, 2]]]


def test_layers_are_those_that_the_unet_has(bundle: Bundle) -> None:
    layers = cross_attention_layers(bundle.config.unet)
    found = {
        (block, name)
        for block, parts in bundle.params["unet"].items()
        for name in parts
        if name.startswith("attentions_")
    }
    assert set(layers) == found
    assert w.layer_names(bundle.config.unet) == ("down.0.0", "mid", "up.1.0", "up.1.1")


def test_rows_that_differ_in_everything_are_single_runs(
    bundle: Bundle, contexts: jax.Array, several: np.ndarray
) -> None:
    """A picture depends on its own prompts and weights alone, to the bit; and all of it is one program."""
    seeds = np.arange(COUNT)
    compiled = []

    def listen(event: str, _: float, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    together = generate(bundle, contexts, weights=several, seeds=seeds, **SETTINGS)
    others = several.copy()
    others[1:] = np.random.default_rng(3).uniform(0, 1, others[1:].shape)
    changed = contexts.at[1:].set(0.5)
    jax.monitoring.register_event_duration_secs_listener(listen)
    alone = generate(bundle, changed, weights=others, seeds=seeds, **SETTINGS)
    jax.monitoring.unregister_event_duration_listener(listen)
    np.testing.assert_array_equal(together[0], alone[0])
    assert not np.array_equal(together[1], alone[1])
    assert compiled == []


def test_four_rows_of_different_kinds_are_four_single_runs(bundle: Bundle, contexts: jax.Array) -> None:
    """Numbers of pictures, weights, masks, layers and steps differ; to the bit, and of one program."""
    unet, left = bundle.config.unet, (np.arange(64).reshape(8, 8) % 8 < 4).astype(np.float32)
    masks = np.stack([left, 0.5 - left / 2, 0.5 - left / 2]) * np.array([1, 0.5, 0.7], np.float32)[:, None, None]
    styled = w.over_layers(unet, ["mid", "up.1.0"]) * w.over_steps(STEPS, 0.3, 1.0) * w.over_places(left[None])
    rows = [
        # A picture; two, of which one counts for more, at some steps; three, each in its place; a picture in some
        # layers, at some steps, in half of the places, and a text in the others.
        (contexts[0, :1], np.ones((1, 1))),
        (contexts[1, :2], np.reshape([0.8, 0.2], (1, 2, 1, 1, 1, 1)) * w.over_steps(STEPS, 0.0, 0.7)),
        (contexts[2], w.over_places(masks)),
        (contexts[3, :2], w.and_the_rest(styled)),
    ]
    together, weights = w.side_by_side(rows)
    assert (together.shape[:2], weights.shape) == ((4, 3), (4, 3, 4, STEPS, 8, 8))
    compiled = []

    def listen(event: str, _: float, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    found = generate(bundle, together, weights=weights, seeds=np.arange(4), **SETTINGS)
    # Alone in a batch of as many: all others are something else.
    alone = [contexts[::-1].at[row].set(together[row]) for row in range(4)]
    others = np.random.default_rng(5).uniform(0, 1, weights.shape).astype(np.float32)
    counted = [np.where(np.arange(4).reshape(-1, 1, 1, 1, 1, 1) == row, weights, others) for row in range(4)]
    singles = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    for context, each in zip(alone, counted, strict=True):
        singles.append(np.asarray(generate(bundle, context, weights=each, seeds=np.arange(4), **SETTINGS)))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    for row, single in enumerate(singles):
        np.testing.assert_array_equal(np.asarray(found)[row], single[row])
        assert not np.array_equal(np.asarray(found)[row - 1], single[row - 1])
    # What fills a row up is nothing: the first is the picture of its one prompt.
    plain = generate(bundle, contexts[:, 0], seeds=np.arange(4), **SETTINGS)
    np.testing.assert_allclose(found[0], plain[0], atol=5e-6)
    with pytest.raises(InputError, match=r"weights have shape \(1, 3, 1, 1, 1, 1\), expected \(1, 2\)"):
        w.side_by_side([(contexts[0, :2], np.ones((1, 3)))])


def test_equal_prompts_with_a_sum_of_one_are_that_prompt(bundle: Bundle, contexts: jax.Array) -> None:
    """To 1e-6, which is float32's rounding over three guided steps: a batch of another size differs by as much."""
    one = contexts[:, 0]
    request, state = begin(bundle, one, seeds=1, **SETTINGS)
    latents = np.asarray(advance(bundle, request, state, 0, STEPS)[0])
    expected = generate(bundle, one, seeds=1, **SETTINGS)
    repeated = jnp.repeat(one[:, None], PROMPTS, axis=1)
    mask = np.random.default_rng(4).uniform(0, 1, (8, 8))
    for weights in (None, w.over_places(np.stack([mask, (1 - mask) / 2, (1 - mask) / 2]))):
        request, state = begin(bundle, repeated, weights=weights, seeds=1, **SETTINGS)
        found = np.asarray(advance(bundle, request, state, 0, STEPS)[0])
        assert np.linalg.norm(found - latents) < 1e-6 * np.linalg.norm(latents)
        pictures = generate(bundle, repeated, weights=weights, seeds=1, **SETTINGS)
        # Decoding adds its own.
        assert jnp.abs(pictures - expected).mean() < 1e-6
        np.testing.assert_allclose(pictures, expected, atol=5e-6)
    # A mask of ones is no mask, whatever would stand elsewhere.
    everywhere = w.over_places(np.stack([np.ones((8, 8)), np.zeros((8, 8)), np.zeros((8, 8))]))
    np.testing.assert_allclose(generate(bundle, contexts, weights=everywhere, seeds=1, **SETTINGS), expected, atol=5e-6)


def test_a_weight_of_nothing_is_no_prompt(bundle: Bundle, contexts: jax.Array) -> None:
    """Those of weight 0 change nothing, wherever they are."""
    weights = np.zeros((1, PROMPTS, 1, 1, 1, 1), np.float32)
    weights[:, 1] = 1
    found = generate(bundle, contexts, weights=weights, seeds=1, **SETTINGS)
    np.testing.assert_allclose(found, generate(bundle, contexts[:, 1], seeds=1, **SETTINGS), atol=5e-6)


def test_one_prompt_runs_the_program_of_one(bundle: Bundle, contexts: jax.Array) -> None:
    alone, state = begin(bundle, contexts[:, 0], seeds=1, **SETTINGS)
    for weights in (None, 1.0 * np.ones((1, 1))):
        request, again = begin(bundle, contexts[:, :1], weights=weights, seeds=1, **SETTINGS)
        assert jax.tree.structure(request) == jax.tree.structure(alone)
        for one, other in zip(jax.tree.leaves((request, again)), jax.tree.leaves((alone, state)), strict=True):
            assert one.dtype == other.dtype
            assert jnp.array_equal(one, other)


def test_weights_over_a_mesh(bundle: Bundle, contexts: jax.Array, several: np.ndarray) -> None:
    expected = generate(bundle, contexts, weights=several, seeds=2, **SETTINGS)
    found, _ = parallel.generate(parallel.make_mesh("data=2"), bundle, contexts, weights=several, seeds=2, **SETTINGS)
    np.testing.assert_allclose(found, expected, atol=2.5 / 255)


def test_weights_are_made_of_parts(bundle: Bundle) -> None:
    unet = bundle.config.unet
    assert w.over_steps(4, 0.25, 0.75).ravel().tolist() == [0, 1, 1, 0]
    assert w.over_steps(10, 0.0, 0.3).sum() == 3
    assert w.over_layers(unet, ["up", "mid"]).ravel().tolist() == [0, 1, 1, 1]
    assert w.over_layers(unet, ["up.1.0"]).ravel().tolist() == [0, 0, 1, 0]
    product = w.over_steps(4, 0.25, 0.75) * w.over_layers(unet, ["mid"]) * w.over_places(np.ones((2, 8, 8)))
    assert product.shape == (1, 2, 4, 4, 8, 8)
    whole = w.and_the_rest(product / 2)
    assert whole.shape == (1, 3, 4, 4, 8, 8)
    np.testing.assert_allclose(whole.sum(axis=1), 1)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((COUNT, PROMPTS + 1), r"weights have shape \(4, 4\), expected \(4, 3, 4, 3\) and two axes"),
        ((2, PROMPTS), r"weights have shape \(2, 3\)"),
        ((1, PROMPTS, 3), r"weights have shape \(1, 3, 3\)"),
        ((1, PROMPTS, 1, 2), r"weights have shape \(1, 3, 1, 2\)"),
        ((1, PROMPTS, 1, 1, 1, 1, 1), r"weights have shape"),
    ],
)
def test_weights_of_another_shape_are_refused(
    bundle: Bundle, contexts: jax.Array, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(bundle, contexts, weights=np.ones(shape), seeds=0, **SETTINGS)


def test_what_does_not_exist_is_refused(bundle: Bundle, contexts: jax.Array) -> None:
    with pytest.raises(InputError, match=r"the layer 'down.7' does not exist, expected one of down.0.0, mid"):
        w.over_layers(bundle.config.unet, ["mid", "down.7"])
    with pytest.raises(InputError, match="expected 0 <= start < end <= 1"):
        w.over_steps(4, 0.6, 0.2)
    with pytest.raises(InputError, match=r"expected \(N, R, L, D\): give it an axis"):
        generate(bundle, contexts[:, 0], weights=np.ones((1, 1)), seeds=0, **SETTINGS)
    with pytest.raises(InputError, match=r"context has shape \(4, 3, 20, 23\), expected \(4, 3, 20, 24\)"):
        generate(bundle, contexts[..., :23], seeds=0, **SETTINGS)
