"""What the golden file of the samplers and the tests that read it share: a stand-in for the model, inputs, cases."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdipc_jax.samplers import SAMPLERS, SchedulerConfig

STEPS = 20
FEW_STEPS = 4
SHAPE = (2, 4, 3, 3)

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}

# name: sampler, fields of scheduler_config.json beside Stable Diffusion's, eta, karras.
GOLDEN: dict[str, tuple[str, dict[str, Any], float, bool]] = {
    "ddim": ("ddim", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 0.0, False),
    "ddim eta": ("ddim", {"clip_sample": False, "steps_offset": 1}, 0.7, False),
    "ddim defaults": ("ddim", {}, 0.0, False),
    "ddim threshold": (
        "ddim",
        {"thresholding": True, "sample_max_value": 2.0, "timestep_spacing": "linspace"},
        0.0,
        False,
    ),
    "ddim zero snr": ("ddim", {**ZERO_SNR, "clip_sample": False}, 0.0, False),
    "pndm": ("pndm", {"steps_offset": 1, "skip_prk_steps": False}, 0.0, False),
    "pndm v": ("pndm", {"timestep_spacing": "linspace", "prediction_type": "v_prediction"}, 0.0, False),
    "euler": ("euler", {}, 0.0, False),
    "euler karras": (
        "euler",
        {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
        0.0,
        False,
    ),
    "euler continuous": ("euler", {"timestep_type": "continuous", **ZERO_SNR}, 0.0, False),
    "euler-a": ("euler-a", {}, 0.0, False),
    "dpm++2m": ("dpm++2m", {}, 0.0, False),
    "dpm++2m karras": ("dpm++2m", {"prediction_type": "sample", "solver_type": "heun"}, 0.0, True),
    "dpm++2m cosine": (
        "dpm++2m",
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
        0.0,
        False,
    ),
    "few euler": ("euler", {"timestep_spacing": "trailing"}, 0.0, False),
    "few euler sample": ("euler", {"timestep_spacing": "trailing", "prediction_type": "sample"}, 0.0, False),
    "few euler-a": ("euler-a", {"timestep_spacing": "trailing"}, 0.0, False),
    "few ddim": (
        "ddim",
        {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False},
        0.0,
        False,
    ),
    "lcm": ("lcm", {"prediction_type": "v_prediction", "clip_sample": True}, 0.0, False),
    "few lcm": ("lcm", {"set_alpha_to_one": False, "steps_offset": 1}, 0.0, False),
    "tcd": ("tcd", {"prediction_type": "sample"}, 0.3, False),
    "few tcd": ("tcd", {"set_alpha_to_one": False, "steps_offset": 1}, 0.3, False),
    "few tcd straight": ("tcd", {}, 0.0, False),
}


def steps_of(case: str) -> int:
    """Of a golden case's run."""
    return FEW_STEPS if case.startswith("few") else STEPS


def model(tanh: Any, x: Any, t: Any) -> Any:
    """A stand-in for the UNet, smooth and of order one, for PyTorch's and JAX's arrays."""
    return 0.7 * tanh(0.9 * x) + 0.3 * tanh(0.01 * t - 3)


def first_noise() -> np.ndarray:
    """Noise of unit variance to start from."""
    return np.random.default_rng(0).standard_normal(SHAPE, np.float32)


def fresh_noise(evaluations: int) -> np.ndarray:
    """The noise of each evaluation, for stochastic samplers."""
    return np.random.default_rng(1).standard_normal((evaluations, *SHAPE), np.float32)


@partial(jax.jit, static_argnums=0)
def run(name: str, schedule: Any, x: jax.Array, noises: jax.Array, eta: jax.Array) -> jax.Array:
    """Latents after each evaluation, (n, *SHAPE)."""
    sampler = SAMPLERS[name]

    def evaluate(state: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        x, history = state
        output = model(jnp.tanh, schedule.input_scale[i] * x, schedule.timesteps[i])
        noise = noises[i] if sampler.stochastic else None
        state = sampler.step(schedule, i, x, output, history, noise, eta)
        return state, state[0]

    x = x * schedule.init_noise_sigma
    return jax.lax.scan(evaluate, (x, sampler.init(x)), jnp.arange(len(schedule.timesteps)))[1]


def trajectory(
    name: str, fields: dict[str, Any], steps: int, eta: float = 0.0, karras: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps (n,), and latents after each evaluation (n, *SHAPE)."""
    schedule = SAMPLERS[name].schedule(SchedulerConfig.from_json(fields), steps, karras=karras)
    evaluations = len(schedule.timesteps)
    states = run(name, schedule, first_noise(), fresh_noise(evaluations), np.float32(eta))
    return np.asarray(schedule.timesteps), np.asarray(states)


def relative_errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each entry of the first axis: the largest difference over the largest value."""
    axes = tuple(range(1, expected.ndim))
    return np.abs(found - expected).max(axis=axes) / np.abs(expected).max(axis=axes)
