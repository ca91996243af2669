"""The methods of consistency models: each evaluation tells the picture, and all but the last put noise on it again.

Latents are x = alpha * x0 + sigma * noise with alpha^2 + sigma^2 = 1.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sdipc_jax.samplers.noise_levels import (
    ConsistencyOptions,
    LCMOptions,
    SchedulerConfig,
    TCDOptions,
    alpha_bars,
    distilled_timesteps,
    read_options,
)
from sdipc_jax.samplers.sampler import (
    Latents,
    Schedule,
    at,
    check_signal,
    finished,
    limited,
    preconditioning,
    threshold_of,
)


@np.errstate(all="ignore")
def lcm_schedule(config: SchedulerConfig, steps: int, karras: bool = False, first: int = 0) -> Schedule:
    """For `lcm_step`."""
    options = read_options(LCMOptions, config, steps, karras)
    timesteps, alpha, sigma = _levels(options, steps, first)
    c_skip, c_out = preconditioning(options.prediction_type, alpha, sigma)
    # The boundary condition: at timestep 0 the picture is x itself. sigma_data is 1/2.
    scaled = timesteps * options.timestep_scaling
    keep, gain = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    schedule = Schedule(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        coefficients=(c_skip, c_out, keep, gain, np.append(alpha[1:], 1), np.append(sigma[1:], 0)),
        clip=options.clip_sample_range if options.clip_sample else None,
        threshold=threshold_of(options),
        levels=(np.append(alpha, 1), np.append(sigma, 0)),
    )
    return finished(options, schedule)


def lcm_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Luo et al. 2023 (Latent Consistency Models), eq. 9 and Algorithm 3. The last step ends without noise."""
    c_skip, c_out, keep, gain, next_alpha, next_sigma = at(schedule, i)
    picture = gain * limited(schedule, c_skip * x + c_out * output) + keep * x
    return next_alpha * picture + next_sigma * noise, history


@np.errstate(all="ignore")
def tcd_schedule(config: SchedulerConfig, steps: int, karras: bool = False, first: int = 0) -> Schedule:
    """For `tcd_step`. The last step ends at timestep 0, which has some noise left."""
    options = read_options(TCDOptions, config, steps, karras)
    timesteps, alpha, sigma = _levels(options, steps, first)
    c_skip, c_out = preconditioning(options.prediction_type, alpha, sigma)
    schedule = Schedule(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        coefficients=(c_skip, c_out, alpha, sigma, np.append(timesteps[1:], 0)),
        alpha_bar=alpha_bars(options, zero_snr=options.rescale_betas_zero_snr),
        levels=(np.append(alpha, 1), np.append(sigma, 0)),
    )
    return finished(options, schedule)


def tcd_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Zheng et al. 2024 (Trajectory Consistency Distillation), Algorithm 4, whose gamma is `eta`.

    Along the trajectory to timestep s = floor((1 - eta) t), and with fresh noise up to the next timestep t.
    """
    c_skip, c_out, alpha, sigma, following = at(schedule, i)
    table = jnp.asarray(schedule.alpha_bar)
    below, there = (table[t.astype(int)] for t in (jnp.floor((1 - eta) * following), following))
    denoised = c_skip * x + c_out * output
    direction = (x - alpha * denoised) / sigma
    x = jnp.sqrt(below) * denoised + jnp.sqrt(1 - below) * direction
    return jnp.sqrt(there / below) * x + jnp.sqrt(1 - there / below) * noise, history


def _levels(options: ConsistencyOptions, steps: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps, and alpha and sigma there, float64, (n,) each."""
    timesteps = distilled_timesteps(options, steps)[first:]
    alpha_bar = alpha_bars(options, zero_snr=options.rescale_betas_zero_snr)[timesteps].astype(np.float64)
    check_signal(options, alpha_bar, timesteps[0])
    return timesteps, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
