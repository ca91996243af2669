"""The methods that follow the path from noise to picture: DDIM, PNDM, Euler's, DPM-Solver++; and the table of all."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sdipc_jax.errors import InputError
from sdipc_jax.samplers.consistency import lcm_schedule, lcm_step, tcd_schedule, tcd_step
from sdipc_jax.samplers.noise_levels import (
    FILE,
    DDIMOptions,
    DPMSolverOptions,
    EulerAncestralOptions,
    EulerOptions,
    PNDMOptions,
    SchedulerConfig,
    SigmaOptions,
    alpha_bars,
    read_options,
    respaced_sigmas,
    spaced_timesteps,
    timesteps_of,
    trained_sigmas,
    with_last,
)
from sdipc_jax.samplers.sampler import (
    Latents,
    Sampler,
    Schedule,
    at,
    check_signal,
    finished,
    limited,
    preconditioning,
    threshold_of,
)


@np.errstate(all="ignore")
def _ddim_schedule(config: SchedulerConfig, steps: int, karras: bool = False, first: int = 0) -> Schedule:
    options = read_options(DDIMOptions, config, steps, karras)
    count = options.num_train_timesteps
    timesteps = np.round(spaced_timesteps(options, steps, below=count)).astype(int)[first:]
    alpha_bar = alpha_bars(options, zero_snr=options.rescale_betas_zero_snr)
    here, there = _before_and_after(options, alpha_bar, timesteps, count // steps)
    check_signal(options, here, timesteps[0])
    alpha, sigma, next_alpha, next_sigma = np.sqrt([here, 1 - here, there, 1 - there])
    fresh = np.sqrt(1 - here / there) / sigma
    c_skip, c_out = preconditioning(options.prediction_type, alpha, sigma)
    schedule = Schedule(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        coefficients=(c_skip, c_out, alpha, sigma, next_alpha, next_sigma, fresh),
        levels=(np.append(alpha, 1), np.append(sigma, 0)),
        clip=options.clip_sample_range if options.clip_sample else None,
        threshold=threshold_of(options),
    )
    return finished(options, schedule)


def _ddim_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Song et al. 2021, eq. 12. Of the noise in the next x, the share eta * fresh is new (eq. 16).

    The direction that points to x is that of x0 before clipping, as in diffusers.
    """
    c_skip, c_out, alpha, sigma, next_alpha, next_sigma, fresh = at(schedule, i)
    denoised = c_skip * x + c_out * output
    direction = (x - alpha * denoised) / sigma
    share = eta * fresh
    x = next_alpha * limited(schedule, denoised) + next_sigma * jnp.sqrt(1 - share**2) * direction
    return x + next_sigma * share * noise, history


# Adams-Bashforth weights from the newest output to the oldest, but for the second row, which is explained below.
_MULTISTEP = (
    np.array([[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], np.float64) / 24
)


@np.errstate(all="ignore")
def _pndm_schedule(config: SchedulerConfig, steps: int, karras: bool = False, first: int = 0) -> Schedule:
    """The second timestep comes twice, so two steps or more take one evaluation more than there are steps.

    The first step leads to where the second evaluation is made. It is then taken again from its start, with the mean
    of both outputs. The start need not be kept: steps are linear, so it is (x - weight * output) / keep of the first.
    """
    options = read_options(PNDMOptions, config, steps, karras)
    count = options.num_train_timesteps
    timesteps = np.round(spaced_timesteps(options, steps, below=count)).astype(int)
    timesteps = np.insert(timesteps, 1, timesteps[1:2])[first:]
    stride, starts = count // steps, timesteps.copy()
    starts[1:2] += stride
    here, there = _before_and_after(options, alpha_bars(options), starts, stride)
    keep = np.sqrt(there / here)
    weight = (here - there) / (here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there))
    if options.prediction_type == "v_prediction":
        keep, weight = keep + weight * np.sqrt(1 - here), weight * np.sqrt(here)
    weights = weight[:, None] * _MULTISTEP[np.minimum(np.arange(len(timesteps)), 4)]
    if len(timesteps) > 1:
        keep[1] /= keep[0]
        weights[1, 1] -= keep[1] * weight[0]
    alpha_bar = alpha_bars(options)[timesteps].astype(np.float64)
    levels = np.append(np.sqrt(alpha_bar), 1), np.append(np.sqrt(1 - alpha_bar), 0)
    return finished(options, Schedule(timesteps, 1.0, np.ones(len(timesteps)), (keep, weights), levels=levels))


def _pndm_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Liu et al. 2022, eqs. 9 and 12: the linear multistep method, with the last three outputs as history.

    The output at the repeated timestep does not enter the history.
    """
    keep, weights = at(schedule, i)
    outputs = (output, *history)
    x = keep * x + sum(weight * past for weight, past in zip(weights, outputs, strict=True))
    return x, tuple(jnp.where(i == 1, old, new) for old, new in zip(history, outputs, strict=False))


@np.errstate(all="ignore")
def _euler_schedule(config: SchedulerConfig, steps: int, karras: bool = False, first: int = 0) -> Schedule:
    options = read_options(EulerOptions, config, steps, karras)
    trained = trained_sigmas(options)
    timesteps = spaced_timesteps(options, steps, below=len(trained)).astype(np.float32)
    if options.interpolation_type == "log_linear":
        # One more than there are timesteps, so that the last step ends at the lowest sigma and not at 0. (With
        # continuous timesteps, which are made from the sigmas, it is one evaluation more.)
        sigmas: np.ndarray = np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), steps + 1))
    else:
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    respaced = respaced_sigmas(options, sigmas, steps)
    if respaced is not None:
        sigmas, timesteps = respaced, timesteps_of(respaced, trained)
    sigmas = with_last(options, sigmas, trained)
    if options.timestep_type == "continuous" and options.prediction_type == "v_prediction":
        timesteps = np.log(sigmas[:-1]) / 4
    sigmas, timesteps = sigmas[first:], timesteps[first:]
    sigma, sigma_down = sigmas[: len(timesteps)], sigmas[1 : len(timesteps) + 1]
    return finished(options, _variance_exploding(options, timesteps, sigma, sigma_down))


def _euler_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Euler's method for dx/dsigma = (x - x0) / sigma (Karras et al. 2022, Algorithm 1 without lines 6 to 8)."""
    c_skip, c_out, sigma, sigma_down, *_ = at(schedule, i)
    derivative = (x - (c_skip * x + c_out * output)) / sigma
    return x + derivative * (sigma_down - sigma), history


@np.errstate(all="ignore")
def _euler_ancestral_schedule(config: SchedulerConfig, steps: int, karras: bool = False, first: int = 0) -> Schedule:
    options = read_options(EulerAncestralOptions, config, steps, karras)
    trained = trained_sigmas(options)
    timesteps = spaced_timesteps(options, steps, below=len(trained)).astype(np.float32)
    sigmas = np.append(np.interp(timesteps, np.arange(len(trained)), trained), 0).astype(np.float32)[first:]
    timesteps = timesteps[first:]
    # Still in float32: at zero terminal SNR the first sigma_down is mostly rounding, and diffusers has it so.
    sigma, target = sigmas[:-1], sigmas[1:]
    sigma_up = np.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
    sigma_down = np.sqrt(target**2 - sigma_up**2)
    return finished(options, _variance_exploding(options, timesteps, sigma, sigma_down, sigma_up))


def _euler_ancestral_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Euler's method to below the next level, and fresh noise up to it: Song et al. 2021, eq. 16 with eta = 1."""
    x, history = _euler_step(schedule, i, x, output, history, noise, eta)
    *_, sigma_up = at(schedule, i)
    return x + sigma_up * noise, history


@np.errstate(all="ignore")
def _dpm_solver_schedule(config: SchedulerConfig, steps: int, karras: bool = False, first: int = 0) -> Schedule:
    options = read_options(DPMSolverOptions, config, steps, karras)
    trained = trained_sigmas(options)
    respaced = respaced_sigmas(options, trained[::-1], steps)
    if respaced is None:
        # lambda = log(alpha / sigma).
        below = len(trained) - int(np.searchsorted(-np.log(trained[::-1]), options.lambda_min_clipped))
        timesteps = np.round(spaced_timesteps(options, steps, below=below, spare=1))
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    else:
        sigmas, timesteps = respaced, timesteps_of(respaced, trained)
        if (options.use_karras_sigmas or options.use_lu_lambdas) and options.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = np.trunc(timesteps)
    sigmas = with_last(options, sigmas, trained).astype(np.float64)
    few = options.lower_order_final and len(timesteps) < 15
    sigmas, timesteps = sigmas[first:], timesteps[first:]
    alpha, ratio = 1 / np.sqrt(sigmas**2 + 1), sigmas[1:] / sigmas[:-1]
    alpha, next_alpha = alpha[:-1], alpha[1:]
    c_skip, c_out = preconditioning(options.prediction_type, alpha, sigmas[:-1] * alpha)
    h = -np.log(ratio)
    # 1 - ratio is 1 - e^-h.
    slope = 1 - (1 - ratio) / h if options.solver_type == "heun" else (1 - ratio) / 2
    correction = np.append(0, slope[1:] * h[1:] / h[:-1])
    if options.euler_at_final or few or options.final_sigmas_type == "zero":
        correction[-1] = 0
    if options.solver_order == 1:
        correction[:] = 0
    schedule = Schedule(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        coefficients=(
            c_skip,
            c_out,
            ratio * next_alpha / alpha,
            next_alpha * (1 - ratio),
            next_alpha * correction,
        ),
        levels=(np.append(alpha, 1), np.append(alpha * sigmas[:-1], 0)),
        threshold=threshold_of(options),
    )
    return finished(options, schedule)


def _dpm_solver_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Lu et al. 2022 (DPM-Solver++), Algorithm 2, with the last x0 as history.

    The correction is 0 for the first evaluation, which has no history, and where a step of first order ends the run.
    """
    c_skip, c_out, keep, gain, correction = at(schedule, i)
    denoised = limited(schedule, c_skip * x + c_out * output)
    return keep * x + gain * denoised + correction * (denoised - history), denoised


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(_ddim_schedule, _ddim_step, stochastic=True),
    "pndm": Sampler(_pndm_schedule, _pndm_step, init=lambda x: (jnp.zeros_like(x),) * 3),
    "euler": Sampler(_euler_schedule, _euler_step),
    "euler-a": Sampler(_euler_ancestral_schedule, _euler_ancestral_step, stochastic=True),
    "dpm++2m": Sampler(_dpm_solver_schedule, _dpm_solver_step, init=jnp.zeros_like),
    "lcm": Sampler(lcm_schedule, lcm_step, stochastic=True),
    "tcd": Sampler(tcd_schedule, tcd_step, stochastic=True),
}


def _before_and_after(
    options: DDIMOptions | PNDMOptions, alpha_bar: np.ndarray, timesteps: np.ndarray, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """alpha_bar at the timesteps and one stride below, float64, (n,) each."""
    count = len(alpha_bar)
    if timesteps.max() >= count:
        raise InputError(
            f"{FILE}: steps_offset is {options.steps_offset}, which here leads to timestep {timesteps.max()}, expected "
            f"less than {count} (num_train_timesteps): use fewer steps"
        )
    alpha_bar = alpha_bar.astype(np.float64)
    below = timesteps - stride
    last = 1.0 if options.set_alpha_to_one else alpha_bar[0]
    return alpha_bar[timesteps], np.where(below < 0, last, alpha_bar[np.maximum(below, 0)])


def _variance_exploding(
    options: SigmaOptions, timesteps: np.ndarray, sigma: np.ndarray, sigma_down: np.ndarray, *more: np.ndarray
) -> Schedule:
    """For Euler's methods, whose steps go from `sigma` to `sigma_down`."""
    alpha = 1 / np.sqrt(sigma.astype(np.float64) ** 2 + 1)
    c_skip, c_out = preconditioning(options.prediction_type, alpha, sigma * alpha)
    largest = float(sigma.max())
    return Schedule(
        timesteps=timesteps,
        init_noise_sigma=(largest**2 + 1) ** 0.5 if options.timestep_spacing == "leading" else largest,
        input_scale=alpha,
        # The step divides by sigma.
        coefficients=(c_skip * alpha, c_out, np.where(sigma > 0, sigma, np.nan), sigma_down, *more),
        levels=(np.ones(len(sigma) + 1), np.append(sigma, 0)),
    )
