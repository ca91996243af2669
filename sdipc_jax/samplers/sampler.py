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
from sdipc_jax.samplers.noise_levels import FILE, Options, SigmaOptions, ThresholdOptions


class Schedule(NamedTuple):
    """The arrays of one run with n evaluations of the model: a pytree, float32.

    Attributes:
        timesteps: what the model is told, (n,). Euler's may lie between two whole ones.
        init_noise_sigma: noise of unit variance times this is the first x, ().
        input_scale: the model is shown `input_scale[i] * x`, (n,).
        coefficients: what the method's step reads, each (n, ...).
        clip: x0 is kept within -clip and clip, (); None if it is not.
        threshold: ratio and largest bound of dynamic thresholding, each (); None without it.
        alpha_bar: alpha^2 at each timestep of training, (T,), where a step chooses among them; None elsewhere.
        levels: the shares of picture and noise in x before each evaluation and after the last, (n + 1,) each: what a
            run that starts from a picture adds to it. No step reads them.
    """

    timesteps: Any
    init_noise_sigma: Any
    input_scale: Any
    coefficients: tuple[Any, ...]
    clip: Any = None
    threshold: tuple[Any, Any] | None = None
    alpha_bar: Any = None
    levels: Any = None


Latents = Float[Array, "N ..."]
# schedule, i, x, output, history, noise, eta -> x, history
Step = Callable[[Schedule, Any, Latents, Latents, Any, Any, Any], tuple[Latents, Any]]


class Sampler(NamedTuple):
    """A sampling method.

    Attributes:
        schedule: `schedule(config, steps, karras=False, first=0)` gives a Schedule of NumPy arrays, that of a run which
            begins with evaluation `first`, or raises InputError.
        step: `step(schedule, i, x, output, history, noise, eta)` gives the next x and history. `output` is the
            model's. `noise` has x's shape and unit variance; methods that are not stochastic ignore it. `eta` is
            DDIM's and TCD's share of fresh noise, 0 to 1; the others ignore it.
        init: `init(x)` gives the first history.
        stochastic: whether `step` reads `noise`.
    """

    schedule: Callable[..., Schedule]
    step: Step
    init: Callable[[Latents], Any] = lambda x: ()
    stochastic: bool = False


def preconditioning(prediction_type: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c_skip and c_out, with which x0 = c_skip * x + c_out * output (Karras et al. 2022, eq. 7)."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def check_signal(options: Options, alpha_bar: np.ndarray, timestep: Any) -> None:
    """Refuses to divide by the signal where there is none.

    Raises:
        InputError: the noise is predicted, and alpha_bar is 0 somewhere in the run.
    """
    if options.prediction_type == "epsilon" and not alpha_bar.all():
        raise InputError(
            f"{FILE}: prediction_type is 'epsilon' and rescale_betas_zero_snr True, but at timestep {timestep} "
            "all is noise then and x0 cannot be told: expected 'v_prediction' or 'sample', use another checkpoint"
        )


def threshold_of(options: ThresholdOptions) -> tuple[float, float] | None:
    return (options.dynamic_thresholding_ratio, options.sample_max_value) if options.thresholding else None


def finished(options: Options, schedule: Schedule) -> Schedule:
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


def limited(schedule: Schedule, denoised: Latents) -> Latents:
    """Clips x0, or divides each picture by a percentile of its values (Saharia et al. 2022, section 2.3)."""
    if schedule.threshold is not None:
        ratio, largest = schedule.threshold
        bound = jnp.quantile(jnp.abs(denoised), ratio, axis=tuple(range(1, denoised.ndim)), keepdims=True)
        bound = jnp.clip(bound, 1, largest)
        return jnp.clip(denoised, -bound, bound) / bound
    return denoised if schedule.clip is None else jnp.clip(denoised, -schedule.clip, schedule.clip)


def at(schedule: Schedule, i: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(values)[i] for values in schedule.coefficients)
