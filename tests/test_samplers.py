from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdipc_jax.errors import InputError
from sdipc_jax.samplers import SAMPLERS, SchedulerConfig
from tests.sampler_cases import (
    GOLDEN,
    STABLE_DIFFUSION,
    STEPS,
    first_noise,
    fresh_noise,
    relative_errors,
    run,
    steps_of,
    trajectory,
)

GOLDEN_FILE = Path(__file__).parent / "golden" / "samplers.npz"


def schedule_of(name: str, fields: dict[str, Any], steps: int, **options: Any) -> Any:
    return SAMPLERS[name].schedule(SchedulerConfig.from_json(fields), steps, **options)


def golden(case: str) -> np.ndarray:
    with np.load(GOLDEN_FILE) as saved:
        return saved[case]


@pytest.mark.parametrize("case", GOLDEN)
def test_ends_where_diffusers_does(case: str) -> None:
    name, fields, eta, karras = GOLDEN[case]
    _, states = trajectory(name, STABLE_DIFFUSION | fields, steps_of(case), eta, karras)
    assert relative_errors(states[-1:], golden(case)[None]) <= 1e-5


def test_pndm_needs_every_evaluation() -> None:
    name, fields, *_ = GOLDEN["pndm"]
    schedule = schedule_of(name, STABLE_DIFFUSION | fields, STEPS)
    assert len(schedule.timesteps) == STEPS + 1
    assert schedule.timesteps[1] == schedule.timesteps[2]
    for dropped in (1, STEPS):
        shorter = jax.tree.map(lambda values, i=dropped: np.delete(values, i, 0) if values.ndim else values, schedule)
        states = run(name, shorter, first_noise(), fresh_noise(STEPS), 0.0)
        assert relative_errors(np.asarray(states[-1:]), golden("pndm")[None]) > 1e-4


@pytest.mark.parametrize("steps, evaluations", [(1, 1), (2, 3), (50, 51)])
def test_pndm_evaluations(steps: int, evaluations: int) -> None:
    assert len(schedule_of("pndm", STABLE_DIFFUSION, steps).timesteps) == evaluations


TWO_STEPS = {"num_train_timesteps": 2, "trained_betas": [0.1, 0.2], "clip_sample": False}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_step_by_hand(eta: float) -> None:
    # The products of 1 - beta are 0.9 and 0.72.
    schedule = schedule_of("ddim", TWO_STEPS, 2)
    np.testing.assert_array_equal(schedule.timesteps, [1, 0])
    x, output, noise = (jnp.full((1, 1), value) for value in (1.0, 0.5, -2.0))
    found, _ = SAMPLERS["ddim"].step(schedule, 0, x, output, (), noise, eta)
    x0 = (1 - 0.28**0.5 * 0.5) / 0.72**0.5
    variance = eta * 0.1 / 0.28 * (1 - 0.72 / 0.9)
    expected = 0.9**0.5 * x0 + (0.1 - variance) ** 0.5 * 0.5 - 2 * variance**0.5
    np.testing.assert_allclose(found, [[expected]], rtol=1e-6)


def test_ddim_clips_x0_and_not_the_direction() -> None:
    schedule = schedule_of("ddim", TWO_STEPS | {"clip_sample": True, "clip_sample_range": 0.25}, 2)
    found, _ = SAMPLERS["ddim"].step(schedule, 0, jnp.ones((1, 1)), jnp.full((1, 1), 0.5), (), jnp.zeros((1, 1)), 0.0)
    np.testing.assert_allclose(found, [[0.9**0.5 * 0.25 + 0.1**0.5 * 0.5]], rtol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
def test_dynamic_thresholding_by_hand(name: str) -> None:
    fields = TWO_STEPS | {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 3.0}
    schedule = schedule_of(name, fields | {"prediction_type": "sample"}, 1)
    # Medians 2, 0.2 and 5: the bounds are 2, at least 1, and at most 3.
    output = jnp.array([[-1.0, 2.0, 4.0], [0.1, -0.2, 1.5], [5.0, 5.0, 1.5]])
    bounded = np.array([[-0.5, 1.0, 1.0], [0.1, -0.2, 1.0], [1.0, 1.0, 0.5]])
    # The only step leads to x0.
    found, _ = SAMPLERS[name].step(
        schedule, 0, jnp.ones((3, 3)), output, SAMPLERS[name].init(output), jnp.ones((3, 3)), 0.0
    )
    np.testing.assert_allclose(found, bounded, rtol=1e-6)


def test_lcm_step_by_hand() -> None:
    # Timesteps 1 and 0 of two; the products of 1 - beta are 0.72 and 0.9.
    schedule = schedule_of("lcm", TWO_STEPS | {"original_inference_steps": 2, "timestep_scaling": 0.5}, 2)
    np.testing.assert_array_equal(schedule.timesteps, [1, 0])
    x, output, noise = (jnp.full((1, 1), value) for value in (1.0, 0.5, -2.0))
    x0 = (1 - 0.28**0.5 * 0.5) / 0.72**0.5
    # (0.5 * 1)^2 is as much as sigma_data^2.
    picture = 0.5**0.5 * x0 + 0.5 * 1.0
    found, _ = SAMPLERS["lcm"].step(schedule, 0, x, output, (), noise, 0.0)
    np.testing.assert_allclose(found, [[0.9**0.5 * picture - 2 * 0.1**0.5]], rtol=1e-6)
    # At timestep 0 the picture is x, whatever the network says, and no noise comes on it.
    last, _ = SAMPLERS["lcm"].step(schedule, 1, x, output, (), noise, 0.0)
    np.testing.assert_array_equal(last, x)


@pytest.mark.parametrize("eta, below", [(0.0, 0.72), (0.4, 0.9), (1.0, 0.9)])
def test_tcd_step_by_hand(eta: float, below: float) -> None:
    # From timestep 2 by way of timestep floor((1 - eta) 1) to 1.
    fields = {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.25], "original_inference_steps": 3}
    schedule = schedule_of("tcd", fields, 3)
    np.testing.assert_array_equal(schedule.timesteps, [2, 1, 0])
    x, output, noise = (jnp.full((1, 1), value) for value in (1.0, 0.5, -2.0))
    x0 = (1 - 0.46**0.5 * 0.5) / 0.54**0.5
    there = below**0.5 * x0 + (1 - below) ** 0.5 * 0.5
    found, _ = SAMPLERS["tcd"].step(schedule, 0, x, output, (), noise, eta)
    expected = (0.72 / below) ** 0.5 * there - 2 * (1 - 0.72 / below) ** 0.5
    np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


@pytest.mark.parametrize("name", ["euler", "euler-a"])
def test_one_trailing_step_leads_to_the_picture_that_the_network_tells(name: str) -> None:
    schedule = schedule_of(name, STABLE_DIFFUSION | {"timestep_spacing": "trailing"}, 1)
    assert schedule.timesteps.tolist() == [999]
    sigma = schedule.coefficients[2][0]
    assert schedule.init_noise_sigma == sigma
    x, output = jnp.full((1, 1), 3.0), jnp.full((1, 1), 0.1)
    found, _ = SAMPLERS[name].step(schedule, 0, x, output, (), jnp.ones((1, 1)), 0.0)
    np.testing.assert_allclose(found, [[3 - 0.1 * sigma]], rtol=1e-6)


def test_euler_on_a_linear_equation() -> None:
    # With epsilon prediction dx/dsigma is the output. For output = x / 10 each step multiplies by 1 + dsigma / 10.
    errors = []
    for steps in (30, 60):
        schedule = schedule_of("euler", STABLE_DIFFUSION, steps)
        x = jnp.ones((1, 1))
        for i in range(steps):
            x, _ = SAMPLERS["euler"].step(schedule, i, x, 0.1 * x, (), None, 0.0)
        _, _, sigma, sigma_down = schedule.coefficients
        np.testing.assert_allclose(x, [[np.prod(1 + 0.1 * (sigma_down - sigma))]], rtol=1e-5)
        errors.append(abs(float(x[0, 0]) - np.exp(-0.1 * sigma[0])))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("name", SAMPLERS)
def test_exact_noise_of_one_picture_leads_to_it(name: str) -> None:
    fields = STABLE_DIFFUSION | {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": False}
    schedule = schedule_of(name, fields, 10)
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[schedule.timesteps.astype(int)]
    picture = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    sampler, generator = SAMPLERS[name], np.random.default_rng(2)
    x = jnp.asarray(generator.standard_normal(picture.shape), jnp.float32) * schedule.init_noise_sigma
    history = sampler.init(x)
    for i, now in enumerate(alpha_bar):
        output = (schedule.input_scale[i] * x - now**0.5 * picture) / (1 - now) ** 0.5
        noise = generator.standard_normal(picture.shape)
        x, history = sampler.step(schedule, i, x, output, history, noise, 0.5)
    if name == "tcd":
        # It ends at timestep 0, with the noise of that.
        picture = 0.99915**0.5 * picture + 0.00085**0.5 * output
    np.testing.assert_allclose(x, picture, atol=1e-4)


def test_second_order_is_more_accurate_than_first() -> None:
    errors = []
    for order in (1, 2):
        fields = STABLE_DIFFUSION | {"solver_order": order}
        fine = trajectory("dpm++2m", fields, 400)[1][-1:]
        errors.append(relative_errors(trajectory("dpm++2m", fields, 40)[1][-1:], fine))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_read_where_it_should_be(name: str) -> None:
    schedule = schedule_of(name, STABLE_DIFFUSION, 4)
    ends = {
        (seed, eta): np.asarray(run(name, schedule, first_noise(), fresh_noise(8) * seed, eta)[-1])
        for seed in (1, 2)
        for eta in (0.0, 0.5)
    }
    assert np.array_equal(ends[1, 0.0], ends[2, 0.0]) == (name not in ("euler-a", "lcm"))
    assert np.array_equal(ends[1, 0.5], ends[2, 0.5]) != SAMPLERS[name].stochastic
    assert np.array_equal(ends[1, 0.0], ends[1, 0.5]) == (name not in ("ddim", "tcd"))


def test_other_values_compile_nothing() -> None:
    files = ({}, {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "solver_type": "heun"})
    schedules = [
        schedule_of("dpm++2m", STABLE_DIFFUSION | fields, 5, karras=karras)
        for fields in files
        for karras in (False, True)
    ]
    run("dpm++2m", schedules[0], first_noise(), fresh_noise(5), np.float32(0))
    programs = run._cache_size()
    for schedule in schedules[1:]:
        run("dpm++2m", schedule, first_noise(), fresh_noise(5), np.float32(0))
    assert run._cache_size() == programs


def test_missing_fields_have_the_defaults_of_the_class() -> None:
    assert schedule_of("ddim", {}, 4).timesteps.tolist() == [750, 500, 250, 0]
    assert schedule_of("euler", {}, 4).timesteps.tolist() == [999, 666, 333, 0]
    assert schedule_of("dpm++2m", {}, 4).timesteps.tolist() == [999, 749, 500, 250]
    listed = {"steps_offset": 1, "timestep_spacing": "linspace", "_use_default_values": ["steps_offset"]}
    assert schedule_of("pndm", listed, 4).timesteps.tolist() == [999, 666, 666, 333, 0]


def test_fields_of_other_classes_are_kept_and_not_read() -> None:
    values = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "use_flow_sigmas": True, "trained_betas": None}
    config = SchedulerConfig.from_json(values)
    assert config.to_json() == values
    assert config == SchedulerConfig.from_json(dict(reversed(values.items())))
    assert len({config, SchedulerConfig.from_json({})}) == 2
    assert len(SAMPLERS["ddim"].schedule(config, 3).timesteps) == 3


@pytest.mark.parametrize(
    "name, fields, steps, karras, message",
    [
        (
            "dpm++2m",
            {"use_flow_sigmas": True},
            20,
            False,
            "scheduler_config.json: use_flow_sigmas is True, sdipc supports False",
        ),
        ("dpm++2m", {"solver_order": 3}, 20, False, "solver_order is 3, sdipc supports 1 or 2"),
        ("dpm++2m", {"algorithm_type": "sde-dpmsolver++"}, 20, False, "algorithm_type is 'sde-dpmsolver\\+\\+'"),
        ("dpm++2m", {"variance_type": "learned"}, 20, False, "variance_type is 'learned', sdipc supports None"),
        ("dpm++2m", {"use_dynamic_shifting": True}, 20, False, "use_dynamic_shifting is True"),
        ("dpm++2m", {"use_beta_sigmas": True}, 20, True, "use_karras_sigmas and use_beta_sigmas are True"),
        ("dpm++2m", {"use_beta_sigmas": True}, 50, False, "the first two timesteps are both 998, expected"),
        ("dpm++2m", {}, 1000, False, "some coefficients are infinite"),
        ("pndm", {"prediction_type": "sample"}, 20, False, "prediction_type is 'sample', .* with pndm"),
        ("euler-a", {"prediction_type": "sample"}, 20, False, "prediction_type is 'sample', .* with euler-a"),
        ("ddim", {"timestep_spacing": "even"}, 20, False, "timestep_spacing is 'even', sdipc supports 'leading', "),
        ("ddim", {"beta_schedule": "sigmoid"}, 20, False, "beta_schedule is 'sigmoid'"),
        ("ddim", {"steps_offset": None}, 20, False, "steps_offset is None, sdipc supports a valid integer"),
        ("ddim", {"beta_start": float("nan")}, 20, False, "beta_start is nan"),
        ("ddim", {"trained_betas": [0.1]}, 20, False, "trained_betas has 1 entries, expected 1000"),
        ("ddim", {"steps_offset": 1}, 1000, False, "steps_offset is 1, which here leads to timestep 1000"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 20, False, "rescale_betas_zero_snr"),
        ("euler", {"beta_start": 0.0}, 20, False, "some coefficients are infinite"),
        ("euler", {}, 0, False, "steps is 0, expected 1 to 1000"),
        ("pndm", {"num_train_timesteps": 10}, 11, False, "steps is 11, expected 1 to 10"),
        ("lcm", {}, 51, False, "steps is 51, expected 1 to 50 with lcm"),
        ("tcd", {"original_inference_steps": 4}, 5, False, "steps is 5, expected 1 to 4 with tcd"),
        ("lcm", {"original_inference_steps": 1001}, 4, False, "original_inference_steps is 1001, expected 1 to 1000"),
        ("lcm", {"original_inference_steps": 0}, 4, False, "original_inference_steps is 0"),
        ("lcm", {"rescale_betas_zero_snr": True}, 4, False, "rescale_betas_zero_snr True, but at timestep 999"),
        ("tcd", {}, 4, True, "karras is on, but tcd"),
        ("ddim", {}, 20, True, "karras is on, but ddim has no such option: use dpm\\+\\+2m"),
    ],
)
def test_refusals(name: str, fields: dict[str, Any], steps: int, karras: bool, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        schedule_of(name, STABLE_DIFFUSION | fields, steps, karras=karras)
    assert "\n" not in str(refusal.value)
