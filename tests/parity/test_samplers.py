"""Every sampler against diffusers' class, evaluation by evaluation.

A configuration that diffusers refuses, or with which it goes on to infinity, must be refused here.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdipc_jax.errors import InputError
from sdipc_jax.samplers import SAMPLERS, SchedulerConfig
from tests.parity.sampler_oracle import golden_samplers, make, reference
from tests.sampler_cases import STABLE_DIFFUSION, relative_errors, trajectory

# PyTorch's own float32 functions differ between processors: 1e-5 with AVX2 may be 1.6e-5 with AVX-512.
TOLERANCE = 2e-5
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
SWITCHES = {
    "ddim": ("set_alpha_to_one", "clip_sample", "rescale_betas_zero_snr"),
    "pndm": ("set_alpha_to_one",),
    "euler": ("rescale_betas_zero_snr",),
    "euler-a": ("rescale_betas_zero_snr",),
    "dpm++2m": ("rescale_betas_zero_snr", "use_karras_sigmas"),
    "lcm": ("rescale_betas_zero_snr", "clip_sample", "set_alpha_to_one"),
    "tcd": ("rescale_betas_zero_snr", "set_alpha_to_one"),
}
# Whose step takes eta.
ETA = ("ddim", "tcd")


def check(name: str, fields: dict[str, Any], steps: int, **options: Any) -> bool:
    """Compares one run. False if both sides refuse it."""
    fields = STABLE_DIFFUSION | fields
    try:
        timesteps, expected = reference(name, fields, steps, **options)
    except (ValueError, NotImplementedError, IndexError):
        expected = None
    if expected is None or not np.isfinite(expected).all():
        with pytest.raises(InputError):
            trajectory(name, fields, steps, **options)
        return False
    found_timesteps, found = trajectory(name, fields, steps, **options)
    np.testing.assert_allclose(found_timesteps, timesteps, rtol=1e-6, atol=1e-3)
    assert relative_errors(found, expected).max() <= TOLERANCE, (fields, options)
    return True


def combinations(name: str) -> Iterator[dict[str, Any]]:
    switches = SWITCHES[name]
    for offset, *values in itertools.product((0, 1), *((False, True) for _ in switches)):
        yield {"steps_offset": offset, **dict(zip(switches, values, strict=True))}


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_combination(name: str, prediction_type: str, spacing: str, steps: int) -> None:
    ran = 0
    for fields in combinations(name):
        fields |= {"prediction_type": prediction_type, "timestep_spacing": spacing}
        # The grid of lcm and tcd begins at the last timestep, whatever the spacing.
        no_signal = fields.get("rescale_betas_zero_snr") and (spacing != "leading" or name in ("lcm", "tcd"))
        if name in ("ddim", "lcm", "tcd") and no_signal and prediction_type == "epsilon":
            # diffusers divides by 0 there; with clip_sample it then clips the infinity.
            with pytest.raises(InputError, match="rescale_betas_zero_snr"):
                trajectory(name, STABLE_DIFFUSION | fields, steps)
            continue
        # At zero signal, what eta = 1 leaves of the old noise is 0; in diffusers it is the root of a rounding error.
        etas = (0.0,) if name not in ETA else (0.0, 0.5) if no_signal else (0.0, 0.5, 1.0)
        ran += sum(check(name, fields, steps, eta=eta) for eta in etas)
    assert (ran > 0) == (prediction_type != "sample" or name not in ("pndm", "euler-a"))


FIELDS: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": SPACINGS,
    "steps_offset": (0, 1, 3),
    "set_alpha_to_one": (True, False),
    "clip_sample": (True, False),
    "clip_sample_range": (0.5, 1.5),
    "thresholding": (True, False),
    "dynamic_thresholding_ratio": (0.7, 0.995),
    "sample_max_value": (1.0, 1.7),
    "use_karras_sigmas": (True, False, False),
    "use_exponential_sigmas": (True, False, False),
    "use_beta_sigmas": (True, False, False),
    "use_lu_lambdas": (True, False, False),
    "sigma_min": (None, 0.1),
    "sigma_max": (None, 9.0),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "solver_order": (1, 2, 2),
    "solver_type": ("midpoint", "heun", "bh2"),
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
    "lambda_min_clipped": (-float("inf"), -5.1, -1.0),
    "skip_prk_steps": (True, False),
    "_class_name": ("PNDMScheduler", "UniPCMultistepScheduler", "DDIMScheduler"),
    "_use_default_values": ([], ["prediction_type", "sigma_max", "steps_offset"]),
    "num_train_timesteps": (1000, 1000, 100),
    "unheard_of": (1,),
}
CONSISTENCY_FIELDS: dict[str, tuple[Any, ...]] = {
    "original_inference_steps": (50, 16, 7, 1001),
    "timestep_scaling": (10.0, 0.001),
}


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("name", SAMPLERS)
def test_random_files(name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    known = FIELDS | CONSISTENCY_FIELDS if name in ("lcm", "tcd") else FIELDS
    present = [field for field in known if generator.random() < 0.5]
    fields = {field: known[field][generator.integers(len(known[field]))] for field in present}
    if fields.get("beta_schedule") == "squaredcos_cap_v2":
        # Its last sigmas are over 10^4, where float32 has few digits left for the picture.
        fields["timestep_spacing"] = "leading"
    if fields.get("use_lu_lambdas"):
        # With "sigma_min" the last step has no length but for rounding.
        fields["final_sigmas_type"] = "zero"
    check(name, fields, int(generator.choice((1, 2, 7, 16))), eta=float(generator.choice((0.0, 0.6))))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_and_sigmas_for_any_number_of_steps(name: str, spacing: str) -> None:
    # 61 trailing steps are 62 in diffusers, the last at timestep -1.
    for steps in range(1, 51) if name in ("lcm", "tcd") else (*range(1, 100), 103, 250, 333, 501, 998):
        fields = STABLE_DIFFUSION | {"timestep_spacing": spacing, "steps_offset": 1}
        scheduler = make(name, fields, steps)
        schedule = SAMPLERS[name].schedule(SchedulerConfig.from_json(fields), steps)
        np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
        np.testing.assert_allclose(schedule.init_noise_sigma, float(scheduler.init_noise_sigma), rtol=1e-6)
        if name.startswith("euler"):
            np.testing.assert_allclose(schedule.coefficients[2], scheduler.sigmas[:-1].numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "name, steps, fields",
    [
        ("ddim", 1000, {"steps_offset": 1}),
        ("pndm", 1000, {"steps_offset": 1}),
        ("euler", 20, {"use_karras_sigmas": True, "sigma_max": 80.0}),
        ("euler", 20, {"use_karras_sigmas": True, "use_beta_sigmas": True}),
        ("dpm++2m", 1000, {}),
        ("dpm++2m", 1000, {"timestep_spacing": "leading"}),
        ("dpm++2m", 50, {"use_beta_sigmas": True}),
        ("dpm++2m", 20, {"lambda_min_clipped": 50.0}),
        ("euler", 20, {"beta_start": 0.0}),
        ("ddim", 20, {"beta_schedule": "cosine"}),
        ("ddim", 20, {"timestep_spacing": "even"}),
        ("pndm", 20, {"prediction_type": "sample"}),
        ("euler-a", 20, {"prediction_type": "sample"}),
        ("dpm++2m", 20, {"final_sigmas_type": "half"}),
        ("dpm++2m", 20, {"algorithm_type": "dpmsolver"}),
        ("dpm++2m", 20, {"algorithm_type": "deis"}),
    ],
)
def test_refused_by_both(name: str, steps: int, fields: dict[str, Any]) -> None:
    assert not check(name, fields, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a", "lcm", "tcd"])
def test_few_steps(name: str, spacing: str) -> None:
    for steps, offset, kind in itertools.product((1, 2, 4, 8), (0, 1), PREDICTION_TYPES):
        if kind == "sample" and name == "euler-a":
            continue
        fields = {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": kind, "clip_sample": False}
        for eta in (0.0, 0.3, 1.0) if name in ETA else (0.0,):
            assert check(name, fields, steps, eta=eta)


def test_trained_betas() -> None:
    betas = np.linspace(0.001, 0.02, 100).tolist()
    for name in SAMPLERS:
        assert check(name, {"trained_betas": betas, "num_train_timesteps": 100, "original_inference_steps": 20}, 7)


def test_golden_file_is_current() -> None:
    golden = golden_samplers()
    with np.load(Path(__file__).parents[1] / "golden" / "samplers.npz") as saved:
        assert set(saved) == set(golden)
        for case, expected in golden.items():
            # Up to 6e-6 lie between processors.
            assert relative_errors(saved[case][None], expected[None]) <= 1e-5, case
