"""Samplers: how the model's output at one noise level turns latents into those of the next.

A sampler is a triple of functions. `schedule` runs on the host and makes arrays with one entry for each evaluation of
the model, from scheduler_config.json; `init` makes the history that a multistep method carries; `step` is pure, reads
nothing but these arrays, and its index may be traced. Each sampler behaves as diffusers' class for the method does
when it is made from the same file.

Latents are x = alpha * x0 + sigma * noise. alpha^2 + sigma^2 is 1, but for Euler's methods: there alpha is 1, and the
model is shown x / sqrt(1 + sigma^2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.errors import InputError
from sdipc_jax.samplers.noise_levels import (
    FILE,
    DDIMOptions,
    DPMSolverOptions,
    EulerAncestralOptions,
    EulerOptions,
    Options,
    PNDMOptions,
    SchedulerConfig,
    SigmaOptions,
    ThresholdOptions,
    alpha_bars,
    read_options,
    respaced_sigmas,
    spaced_timesteps,
    timesteps_of,
    trained_sigmas,
    with_last,
)


class Schedule(NamedTuple):
    """The arrays of one run with n evaluations of the model: a pytree, float32.

    Attributes:
        timesteps: what the model is told, (n,). Euler's may lie between two whole ones.
        init_noise_sigma: noise of unit variance times this is the first x, ().
        input_scale: the model is shown `input_scale[i] * x`, (n,).
        coefficients: what the method's step reads, each (n, ...).
        clip: x0 is kept within -clip and clip, (); None if it is not.
        threshold: ratio and largest bound of dynamic thresholding, each (); None without it.
    """

    timesteps: Any
    init_noise_sigma: Any
    input_scale: Any
    coefficients: tuple[Any, ...]
    clip: Any = None
    threshold: tuple[Any, Any] | None = None


Latents = Float[Array, "N ..."]
# schedule, i, x, output, history, noise, eta -> x, history
Step = Callable[[Schedule, Any, Latents, Latents, Any, Any, Any], tuple[Latents, Any]]


class Sampler(NamedTuple):
    """A sampling method.

    Attributes:
        schedule: `schedule(config, steps, karras=False)` gives a Schedule of NumPy arrays, or raises InputError.
        step: `step(schedule, i, x, output, history, noise, eta)` gives the next x and history. `output` is the
            model's. `noise` has x's shape and unit variance; methods that are not stochastic ignore it. `eta` is
            DDIM's share of fresh noise, 0 to 1; the others ignore it.
        init: `init(x)` gives the first history.
        stochastic: whether `step` reads `noise`.
    """

    schedule: Callable[..., Schedule]
    step: Step
    init: Callable[[Latents], Any] = lambda x: ()
    stochastic: bool = False


@np.errstate(all="ignore")
def _ddim_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    options = read_options(DDIMOptions, config, steps, karras)
    count = options.num_train_timesteps
    timesteps = np.round(spaced_timesteps(options, steps, below=count)).astype(int)
    alpha_bar = alpha_bars(options, zero_snr=options.rescale_betas_zero_snr)
    here, there = _before_and_after(options, alpha_bar, timesteps, count // steps)
    if options.prediction_type == "epsilon" and not here.all():
        raise InputError(
            f"{FILE}: prediction_type is 'epsilon' and rescale_betas_zero_snr True, but at timestep {timesteps[0]} "
            "all is noise then and x0 cannot be told: expected 'v_prediction' or 'sample', use another checkpoint"
        )
    alpha, sigma, next_alpha, next_sigma = np.sqrt([here, 1 - here, there, 1 - there])
    fresh = np.sqrt(1 - here / there) / sigma
    c_skip, c_out = _preconditioning(options.prediction_type, alpha, sigma)
    schedule = Schedule(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        coefficients=(c_skip, c_out, alpha, sigma, next_alpha, next_sigma, fresh),
        clip=options.clip_sample_range if options.clip_sample else None,
        threshold=_threshold(options),
    )
    return _finished(options, schedule)


def _ddim_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Song et al. 2021, eq. 12. Of the noise in the next x, the share eta * fresh is new (eq. 16).

    The direction that points to x is that of x0 before clipping, as in diffusers.
    """
    c_skip, c_out, alpha, sigma, next_alpha, next_sigma, fresh = _at(schedule, i)
    denoised = c_skip * x + c_out * output
    direction = (x - alpha * denoised) / sigma
    share = eta * fresh
    x = next_alpha * _limited(schedule, denoised) + next_sigma * jnp.sqrt(1 - share**2) * direction
    return x + next_sigma * share * noise, history


# Adams-Bashforth weights from the newest output to the oldest, but for the second row, which is explained below.
_MULTISTEP = (
    np.array([[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], np.float64) / 24
)


@np.errstate(all="ignore")
def _pndm_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    """The second timestep comes twice, so two steps or more take one evaluation more than there are steps.

    The first step leads to where the second evaluation is made. It is then taken again from its start, with the mean
    of both outputs. The start need not be kept: steps are linear, so it is (x - weight * output) / keep of the first.
    """
    options = read_options(PNDMOptions, config, steps, karras)
    count = options.num_train_timesteps
    timesteps = np.round(spaced_timesteps(options, steps, below=count)).astype(int)
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
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
    return _finished(options, Schedule(timesteps, 1.0, np.ones(len(timesteps)), (keep, weights)))


def _pndm_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Liu et al. 2022, eqs. 9 and 12: the linear multistep method, with the last three outputs as history.

    The output at the repeated timestep does not enter the history.
    """
    keep, weights = _at(schedule, i)
    outputs = (output, *history)
    x = keep * x + sum(weight * past for weight, past in zip(weights, outputs, strict=True))
    return x, tuple(jnp.where(i == 1, old, new) for old, new in zip(history, outputs, strict=False))


@np.errstate(all="ignore")
def _euler_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
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
    sigma, sigma_down = sigmas[: len(timesteps)], sigmas[1 : len(timesteps) + 1]
    return _finished(options, _variance_exploding(options, timesteps, sigma, sigma_down))


def _euler_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Euler's method for dx/dsigma = (x - x0) / sigma (Karras et al. 2022, Algorithm 1 without lines 6 to 8)."""
    c_skip, c_out, sigma, sigma_down, *_ = _at(schedule, i)
    derivative = (x - (c_skip * x + c_out * output)) / sigma
    return x + derivative * (sigma_down - sigma), history


@np.errstate(all="ignore")
def _euler_ancestral_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    options = read_options(EulerAncestralOptions, config, steps, karras)
    trained = trained_sigmas(options)
    timesteps = spaced_timesteps(options, steps, below=len(trained)).astype(np.float32)
    sigmas = np.append(np.interp(timesteps, np.arange(len(trained)), trained), 0).astype(np.float32)
    # Still in float32: at zero terminal SNR the first sigma_down is mostly rounding, and diffusers has it so.
    sigma, target = sigmas[:-1], sigmas[1:]
    sigma_up = np.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
    sigma_down = np.sqrt(target**2 - sigma_up**2)
    return _finished(options, _variance_exploding(options, timesteps, sigma, sigma_down, sigma_up))


def _euler_ancestral_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Euler's method to below the next level, and fresh noise up to it: Song et al. 2021, eq. 16 with eta = 1."""
    x, history = _euler_step(schedule, i, x, output, history, noise, eta)
    *_, sigma_up = _at(schedule, i)
    return x + sigma_up * noise, history


@np.errstate(all="ignore")
def _dpm_solver_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
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
    alpha, ratio = 1 / np.sqrt(sigmas**2 + 1), sigmas[1:] / sigmas[:-1]
    alpha, next_alpha = alpha[:-1], alpha[1:]
    c_skip, c_out = _preconditioning(options.prediction_type, alpha, sigmas[:-1] * alpha)
    h = -np.log(ratio)
    # 1 - ratio is 1 - e^-h.
    slope = 1 - (1 - ratio) / h if options.solver_type == "heun" else (1 - ratio) / 2
    correction = np.append(0, slope[1:] * h[1:] / h[:-1])
    few = options.lower_order_final and len(timesteps) < 15
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
        threshold=_threshold(options),
    )
    return _finished(options, schedule)


def _dpm_solver_step(
    schedule: Schedule, i: Any, x: Latents, output: Latents, history: Any, noise: Any, eta: Any
) -> tuple[Latents, Any]:
    """Lu et al. 2022 (DPM-Solver++), Algorithm 2, with the last x0 as history.

    The correction is 0 for the first evaluation, which has no history, and where a step of first order ends the run.
    """
    c_skip, c_out, keep, gain, correction = _at(schedule, i)
    denoised = _limited(schedule, c_skip * x + c_out * output)
    return keep * x + gain * denoised + correction * (denoised - history), denoised


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(_ddim_schedule, _ddim_step, stochastic=True),
    "pndm": Sampler(_pndm_schedule, _pndm_step, init=lambda x: (jnp.zeros_like(x),) * 3),
    "euler": Sampler(_euler_schedule, _euler_step),
    "euler-a": Sampler(_euler_ancestral_schedule, _euler_ancestral_step, stochastic=True),
    "dpm++2m": Sampler(_dpm_solver_schedule, _dpm_solver_step, init=jnp.zeros_like),
}


def _preconditioning(prediction_type: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c_skip and c_out, with which x0 = c_skip * x + c_out * output (Karras et al. 2022, eq. 7)."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


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
    c_skip, c_out = _preconditioning(options.prediction_type, alpha, sigma * alpha)
    largest = float(sigma.max())
    return Schedule(
        timesteps=timesteps,
        init_noise_sigma=(largest**2 + 1) ** 0.5 if options.timestep_spacing == "leading" else largest,
        input_scale=alpha,
        # The step divides by sigma.
        coefficients=(c_skip * alpha, c_out, np.where(sigma > 0, sigma, np.nan), sigma_down, *more),
    )


def _threshold(options: ThresholdOptions) -> tuple[float, float] | None:
    return (options.dynamic_thresholding_ratio, options.sample_max_value) if options.thresholding else None


def _finished(options: Options, schedule: Schedule) -> Schedule:
    """Rounds to float32.

    Raises:
        InputError: a coefficient is not finite, or the first two timesteps are equal: diffusers finds its place among
            the sigmas by the first timestep, so that it would start with the second sigma and run past the last.
    """
    timesteps = schedule.timesteps
    if isinstance(options, SigmaOptions) and len(timesteps) > 1 and timesteps[0] == timesteps[1]:
        problem = f"the first two timesteps are both {timesteps[0]:g}, expected falling ones"
    elif not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(schedule)):
        problem = "some coefficients are infinite, expected finite ones"
    else:
        return jax.tree.map(np.float32, schedule)
    raise InputError(
        f"{FILE}: with {len(timesteps)} evaluations of {options.sampler} {problem}: "
        "use fewer steps, another sampler, or other noise levels in the file"
    )


def _limited(schedule: Schedule, denoised: Latents) -> Latents:
    """Clips x0, or divides each picture by a percentile of its values (Saharia et al. 2022, section 2.3)."""
    if schedule.threshold is not None:
        ratio, largest = schedule.threshold
        bound = jnp.quantile(jnp.abs(denoised), ratio, axis=tuple(range(1, denoised.ndim)), keepdims=True)
        bound = jnp.clip(bound, 1, largest)
        return jnp.clip(denoised, -bound, bound) / bound
    return denoised if schedule.clip is None else jnp.clip(denoised, -schedule.clip, schedule.clip)


def _at(schedule: Schedule, i: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(values)[i] for values in schedule.coefficients)
