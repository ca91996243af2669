"""Eq. 6: the inverse that leaves small singular values out, and the converter made with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdipc_jax import Bundle, InputError, closed_form, convert, text_prompt, tokenize, truncated_pinv
from sdipc_jax.models import CLIPTextConfig
from sdipc_jax.prompts.captions import CAPTIONS
from sdipc_jax.prompts.projection import default_scale
from tests.compare import relative_error

SINGULAR_VALUES = np.array([5.0, 2.0, 0.9, 0.31, 0.29, 0.01])
SHAPES = [(6, 6), (6, 9), (9, 6)]


def matrix_with(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A float64 matrix with these singular values, between bases that depend on the shape alone."""
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((side, len(values))))[0] for side in shape)
    return (left * values) @ right.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff, rank", [(0.0, 6), (0.3, 4), (1.0, 2), (5.0, 1)])
def test_moore_penrose_identities(shape: tuple[int, int], cutoff: float, rank: int) -> None:
    inverse = truncated_pinv(matrix_with(SINGULAR_VALUES, shape), np.nextafter(cutoff, 0))
    truncated = matrix_with(np.where(cutoff <= SINGULAR_VALUES, SINGULAR_VALUES, 0), shape)
    assert inverse.dtype == np.float64
    assert np.linalg.matrix_rank(inverse) == rank
    for found, expected in [
        (truncated @ inverse @ truncated, truncated),
        (inverse @ truncated @ inverse, inverse),
        ((truncated @ inverse).T, truncated @ inverse),
        ((inverse @ truncated).T, inverse @ truncated),
    ]:
        np.testing.assert_allclose(found, expected, atol=1e-10)


def test_cutoff_0_gives_the_exact_inverse() -> None:
    matrix = matrix_with(SINGULAR_VALUES, (6, 6))
    np.testing.assert_allclose(truncated_pinv(matrix, 0.0) @ matrix, np.eye(6), atol=1e-12)


def test_cutoff_is_absolute() -> None:
    matrix = matrix_with(SINGULAR_VALUES, (6, 6))
    assert [np.linalg.matrix_rank(truncated_pinv(scale * matrix, 0.3)) for scale in (0.1, 1, 10)] == [1, 4, 5]


def test_a_singular_value_at_the_cutoff_is_kept() -> None:
    matrix = np.diag([4.0, 0.5, 0.25])
    np.testing.assert_array_equal(truncated_pinv(matrix, 0.5), np.diag([0.25, 2.0, 0.0]))
    np.testing.assert_array_equal(truncated_pinv(matrix, np.nextafter(0.5, 1)), np.diag([0.25, 0.0, 0.0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("jitted", [False, True])
def test_no_singular_value_of_0_is_inverted(shape: tuple[int, int], jitted: bool) -> None:
    values = np.array([4.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    function = jax.jit(truncated_pinv) if jitted else truncated_pinv
    inverse = np.asarray(function(matrix_with(values, shape).astype(np.float32), 0.0))
    assert np.linalg.norm(inverse, 2) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff", [0.0, 0.3, 1.0])
def test_traced_inverse_is_that_of_the_host(shape: tuple[int, int], cutoff: float) -> None:
    matrix = matrix_with(SINGULAR_VALUES[:5] if cutoff == 0 else SINGULAR_VALUES, shape).astype(np.float32)
    on_host = truncated_pinv(matrix, cutoff)
    assert relative_error(jax.jit(truncated_pinv)(matrix, cutoff), on_host) <= 1e-5
    several = jax.vmap(truncated_pinv, in_axes=(0, None))(np.stack([matrix, 2 * matrix]), jnp.float32(cutoff))
    assert relative_error(several[0], on_host) <= 1e-5
    assert relative_error(several[1], truncated_pinv(2 * matrix, cutoff)) <= 1e-5


def test_traced_inverse_takes_bfloat16() -> None:
    matrix = jnp.asarray(matrix_with(SINGULAR_VALUES, (6, 9)), jnp.bfloat16)
    found = jax.jit(truncated_pinv)(matrix, 0.6)
    assert found.dtype == jnp.float32
    assert relative_error(found, truncated_pinv(np.asarray(matrix, np.float64), 0.6)) <= 1e-5


@pytest.mark.parametrize("cutoff", [-0.1, 5.1, np.nan, np.inf])
def test_cutoffs_that_are_refused(cutoff: float) -> None:
    with pytest.raises(InputError, match=rf"^cutoff is {cutoff}, expected 0 to 5, the largest singular value"):
        truncated_pinv(matrix_with(SINGULAR_VALUES, (6, 6)), cutoff)


def test_a_projection_of_zeros_is_refused() -> None:
    with pytest.raises(InputError, match="the text projection is 0 everywhere"):
        truncated_pinv(np.zeros((3, 4)), 0.0)


def features_of(bundle: Bundle, count: int, seed: int = 0) -> np.ndarray:
    """Stand-ins for what `encode_images` gives."""
    width = bundle.config.vision_side.vision.hidden_size
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def with_joint_width(bundle: Bundle, joint: int) -> Bundle:
    """The checkpoint with random projections to a joint space of another width."""
    generator = np.random.default_rng(1)
    clip = dict(bundle.params["clip"])
    for name in ("visual_projection", "text_projection"):
        width = clip[name]["kernel"].shape[0]
        clip[name] = {"kernel": jnp.asarray(generator.standard_normal((width, joint)) / width**0.5, jnp.float32)}
    return dataclasses.replace(bundle, params=bundle.params | {"clip": clip})


@pytest.mark.parametrize("joint", [24, 40, 10])
@pytest.mark.parametrize("mode", ["tspace", "cspace"])
def test_convert_by_hand(tiny: Bundle, joint: int, mode: Any) -> None:
    bundle = with_joint_width(tiny, joint)
    features = features_of(bundle, 3)
    visual, text = (
        np.asarray(bundle.params["clip"][name]["kernel"], np.float64)
        for name in ("visual_projection", "text_projection")
    )
    values = np.linalg.svd(text, compute_uv=False)
    cutoff = float(values[6] + values[7]) / 2
    projection = closed_form(bundle, cutoff, 27.5, mode)
    assert projection.visual.shape == (32, joint)
    assert projection.inverse.shape == (joint, 24)
    assert projection.rank == 7
    np.testing.assert_allclose(projection.singular_values, values, rtol=1e-5, atol=1e-6)

    points = features @ visual
    states = points @ np.linalg.pinv(text, rcond=cutoff / values[0])
    lengths = np.linalg.norm(states if mode == "tspace" else points, axis=1, keepdims=True)
    found = convert(projection, jnp.asarray(features))
    assert relative_error(found, 27.5 * states / lengths) <= 1e-5
    in_tspace = np.allclose(np.linalg.norm(found, axis=1), 27.5, rtol=1e-5)
    assert in_tspace == (mode == "tspace")


def test_convert_under_jit_and_vmap(tiny: Bundle) -> None:
    features = jnp.asarray(features_of(tiny, 6))
    projection = closed_form(tiny)
    expected = convert(projection, features)
    traced = jax.jit(lambda bundle, x: convert(closed_form(bundle, 0.3, projection.scale), x))(tiny, features)
    assert relative_error(traced, expected) <= 1e-5
    mapped = jax.vmap(convert, in_axes=(None, 0))(projection, features.reshape(2, 3, -1))
    assert relative_error(mapped.reshape(6, -1), expected) <= 1e-5


def test_round_trip_recovers_the_direction_of_text_states(tiny: Bundle) -> None:
    tokens = tokenize(tiny, ["a cat", "two dogs at night", "x"])
    ends = np.asarray(text_prompt(tiny, tokens))[range(3), [6, 15, 2]]
    # Tokens are letters here, so the end comes after start and 5, 14 and 1 of them.
    assert (tokens[range(3), [6, 15, 2]] == tiny.config.tokens.end).all()

    def cosines(cutoff: float) -> np.ndarray:
        projection = closed_form(tiny, cutoff)
        projection = dataclasses.replace(projection, visual=tiny.params["clip"]["text_projection"]["kernel"])
        found = np.asarray(convert(projection, jnp.asarray(ends)))
        return (found * ends).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(ends, axis=1)

    assert (cosines(0.0) > 0.999).all()
    assert (cosines(1.0) < 0.99).all()


@pytest.mark.parametrize("fraction, rank", [(1e-9, 1), (0.5, 12), (0.79, 19), (1.0, 24)])
def test_keep_fraction(tiny: Bundle, fraction: float, rank: int) -> None:
    projection = closed_form(tiny, scale=1.0, keep_fraction=fraction)
    assert projection.rank == rank
    lowest_kept = float(projection.singular_values[rank - 1])
    kernel = np.asarray(tiny.params["clip"]["text_projection"]["kernel"])
    assert relative_error(projection.inverse, truncated_pinv(kernel, lowest_kept * (1 - 1e-5))) <= 1e-5


def test_defaults_are_the_checkpoints(tiny: Bundle) -> None:
    projection = closed_form(tiny)
    assert projection.mode == "tspace"
    # The cut-off of the checkpoint in tests/tiny.py.
    assert projection.rank == np.sum(projection.singular_values >= 0.3) < 24
    norms = []
    for caption in CAPTIONS:
        tokens = tokenize(tiny, [caption], truncate=True)
        end = list(tokens[0]).index(tiny.config.tokens.end)
        norms.append(np.linalg.norm(text_prompt(tiny, tokens)[0, end]))
    assert float(projection.scale) == pytest.approx(np.mean(norms), rel=1e-5)
    assert np.std(norms) > 0


def test_scale_of_openai_vit_l14(tiny: Bundle) -> None:
    side = dataclasses.replace(tiny.config.vision_side, projection_dim=768)
    config = dataclasses.replace(tiny.config, text=CLIPTextConfig(hidden_size=768), clip=side)
    assert (config.text.num_hidden_layers, config.text.hidden_size, config.text.vocab_size) == (12, 768, 49408)
    assert default_scale(config) == 27.5
    assert default_scale(dataclasses.replace(config, clip=dataclasses.replace(side, projection_dim=512))) is None
    written = config.defaults.model_copy(update={"scale": 20.0})
    assert default_scale(dataclasses.replace(config, defaults=written)) == 20.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cutoff": 100.0}, r"cutoff is 100.0, expected 0 to \d"),
        ({"scale": 0.0}, "scale is 0.0, expected a positive number"),
        ({"scale": -1.0}, "scale is -1.0, expected a positive number"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"mode": "C"}, "mode is 'C', expected 'tspace' or 'cspace'"),
        ({"keep_fraction": 0.0}, "keep-fraction is 0.0, expected more than 0 and at most 1"),
        ({"keep_fraction": 1.01}, "keep-fraction is 1.01"),
        ({"keep_fraction": float("nan")}, "keep-fraction is nan"),
    ],
)
def test_refusals(tiny: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        closed_form(tiny, **{"scale": 1.0} | options)
