"""Pictures to start from: what stays where it is, and what strength leaves of the steps."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import sdipc_jax as sdipc
from sdipc_jax import Bundle, InputError, parallel
from sdipc_jax.samplers import SAMPLERS, SchedulerConfig
from sdipc_jax.sampling import encode_pictures, start_from
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from sdipc_jax.sampling.start import first_evaluation
from tests import start_cases
from tests.tiny import SCHEDULER, SMALL_UNET, tiny_bundle

SETTINGS: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("start") / "parts", unet=SMALL_UNET)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    picture = start_cases.picture().astype(np.float32) / 255
    return np.stack([picture, picture[::-1]])


@pytest.fixture(scope="module")
def context(bundle: Bundle) -> jax.Array:
    return sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a", "b"]))


def last_latents(bundle: Bundle, context: jax.Array, **settings: Any) -> np.ndarray:
    request, state = begin(bundle, context, seeds=1, **SETTINGS | settings)
    return np.asarray(advance(bundle, request, state, 0, request.evaluations)[0])


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_what_is_not_redone_stays_to_the_bit(
    bundle: Bundle, context: jax.Array, pictures: np.ndarray, sampler: str
) -> None:
    masks = np.stack([start_cases.mask(), start_cases.mask().T])
    start = start_from(bundle, pictures, 1.0, masks)
    assert start.mask is not None
    redone = np.asarray(start.mask)[..., 0] > 0
    # The nearest place: every fourth pixel.
    np.testing.assert_array_equal(redone, masks[:, ::4, ::4])
    found = last_latents(bundle, context, start=start, sampler=sampler)
    original = np.asarray(encode_pictures(bundle, pictures))
    np.testing.assert_array_equal(found[~redone], original[~redone])
    assert np.abs(found - original)[redone].min(axis=-1).max() > 0.01


def test_a_mask_of_ones_is_no_mask(bundle: Bundle, context: jax.Array, pictures: np.ndarray) -> None:
    everywhere = start_from(bundle, pictures, 0.5, np.ones((2, 32, 32)))
    found = last_latents(bundle, context, start=everywhere)
    expected = last_latents(bundle, context, start=start_from(bundle, pictures, 0.5))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_less_strength_changes_less(bundle: Bundle, context: jax.Array, pictures: np.ndarray) -> None:
    original = np.asarray(encode_pictures(bundle, pictures))
    changes = []
    for strength in (0.25, 0.5, 1.0):
        found = last_latents(bundle, context, start=start_from(bundle, pictures, strength))
        changes.append(np.abs(found - original).mean())
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_that_begins_later_has_the_timesteps_of_the_whole(sampler: str) -> None:
    config = SchedulerConfig.from_json(SCHEDULER)
    whole = SAMPLERS[sampler].schedule(config, 6)
    for first in range(1, 6):
        part = SAMPLERS[sampler].schedule(config, 6, first=first)
        np.testing.assert_array_equal(part.timesteps, whole.timesteps[first:])
        for found, expected in zip(part.levels, whole.levels, strict=True):
            np.testing.assert_array_equal(found, expected[first:])
            assert len(found) == len(part.timesteps) + 1
    signal, noise = whole.levels
    assert (signal[-1], noise[-1]) == (1, 0)


def test_a_method_without_memory_may_begin_anywhere() -> None:
    """Its coefficients are those of the whole run's end."""
    config = SchedulerConfig.from_json(SCHEDULER)
    for sampler in ("ddim", "euler", "euler-a"):
        whole, part = (SAMPLERS[sampler].schedule(config, 6, first=first) for first in (0, 2))
        for found, expected in zip(part.coefficients, whole.coefficients, strict=True):
            np.testing.assert_array_equal(found, expected[2:])
    # DPM-Solver++ has no history at its first step, wherever that is.
    assert SAMPLERS["dpm++2m"].schedule(config, 6, first=2).coefficients[-1][0] == 0


def test_rows_start_from_their_own_pictures_on_any_mesh(
    bundle: Bundle, context: jax.Array, pictures: np.ndarray
) -> None:
    start = start_from(bundle, pictures, 0.5, np.stack([start_cases.mask()] * 2))
    together = sdipc.generate(bundle, context, start=start, seeds=1, **SETTINGS)
    swapped = jax.tree.map(lambda leaf: leaf[::-1], start)
    other = sdipc.generate(bundle, context[::-1], start=swapped, seeds=1, **SETTINGS)
    np.testing.assert_array_equal(together, other[::-1])
    meshed, _ = parallel.generate(parallel.make_mesh("data=2"), bundle, context, start=start, seeds=1, **SETTINGS)
    np.testing.assert_allclose(meshed, together, atol=2.5 / 255)


@pytest.mark.parametrize("strength, steps, first", [(1.0, 50, 0), (0.3, 50, 35), (0.6, 10, 4), (0.999, 10, 1)])
def test_steps_are_counted_as_by_others(strength: float, steps: int, first: int) -> None:
    assert first_evaluation(strength, steps) == first


def test_refusals(bundle: Bundle, context: jax.Array, pictures: np.ndarray) -> None:
    for strength in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"strength is {strength}, expected more than 0 and at most 1"):
            start_from(bundle, pictures, strength)
    with pytest.raises(InputError, match=r"the mask has shape \(2, 16, 32\), expected \(2, 32, 32\)"):
        start_from(bundle, pictures, 0.5, np.ones((2, 16, 32)))
    with pytest.raises(InputError, match="a mask is black everywhere"):
        start_from(bundle, pictures, 0.5, np.stack([np.ones((32, 32)), np.zeros((32, 32))]))
    with pytest.raises(InputError, match=r"strength is 0.2, which of 4 steps leaves none"):
        sdipc.generate(bundle, context, start=start_from(bundle, pictures, 0.2), seeds=1, **SETTINGS)
    with pytest.raises(InputError, match=r"have latents \(1, 8, 8, 4\), expected \(2, 8, 8, 4\)"):
        sdipc.generate(bundle, context, start=start_from(bundle, pictures[:1], 0.5), seeds=1, **SETTINGS)


def test_a_unet_that_repaints_needs_a_mask(bundle: Bundle, context: jax.Array, pictures: np.ndarray) -> None:
    unet = dataclasses.replace(SMALL_UNET, in_channels=9)
    repaints = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, unet=unet))
    with pytest.raises(InputError, match="trained to repaint a part of a picture: give a picture and a mask"):
        sdipc.generate(repaints, context, seeds=1, **SETTINGS)
    with pytest.raises(InputError, match="trained to repaint a part of a picture, and there is no mask"):
        start_from(repaints, pictures, 0.5)
