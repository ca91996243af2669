"""Samplers: ways from noise to a picture, each as a pure (schedule, init, step) triple.

`schedule` turns a checkpoint's scheduler_config.json and a number of steps into arrays, on the host, in the
precision that matters; `step` is one evaluation's arithmetic on those arrays and can be traced with its index. The
numbers are those of diffusers' scheduler classes: `Class.from_config(config)` honours the fields that its class knows,
takes the class's defaults for those that are missing, and takes no notice of the rest.

Notation: x the noisy latents, a = alphas_cumprod, x = sqrt(a) x_0 + sqrt(1 - a) noise, and for the Euler samplers
sigma = sqrt((1 - a) / a) and latents x / sqrt(a).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.errors import InputError

Latents = Float[Array, "N *shape"]
History = Any
Options = dict[str, Any]


@dataclass(frozen=True)
class SchedulerConfig:
    """The contents of scheduler_config.json. Each sampler reads it with the defaults of its own class."""

    fields: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SchedulerConfig":
        """Keeps the fields that the file sets itself, as diffusers' `from_config` does."""
        unset = {"_use_default_values", *values.get("_use_default_values", ())}
        kept = ((name, value) for name, value in values.items() if name not in unset)
        return cls(tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in kept))

    def to_json(self) -> dict[str, Any]:
        """The file's contents."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.fields}


class Schedule(NamedTuple):
    """What a run reads, one entry for each evaluation of the UNet.

    Attributes:
        timesteps: what the UNet is told.
        input_scale: the latents are multiplied by it before the UNet sees them.
        init_noise_sigma: the unit noise that a run starts from is multiplied by it.
        arrays: the coefficients that the sampler's step reads, by name.
    """

    timesteps: Float[Array, " E"]
    input_scale: Float[Array, " E"]
    init_noise_sigma: Float[Array, ""]
    arrays: dict[str, Array]


class Sampler(NamedTuple):
    """A way to sample.

    Attributes:
        schedule: (config, steps, *, karras) to `Schedule`; refuses what the method cannot do.
        init: the history before the first step, from the first latents.
        step: (config, schedule, i, x, output, history, noise, eta) to the next latents and history.
        stochastic: whether `step` reads `noise`, unit noise of x's shape.
    """

    schedule: Callable[..., Schedule]
    init: Callable[[Latents], History]
    step: Callable[..., tuple[Latents, History]]
    stochastic: bool


# ---------------------------------------------------------------------------------------------------------------------
# What the classes know, with their defaults, and what is supported at one value alone.

_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}
_DDIM = _COMMON | _THRESHOLDING | {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
_PNDM = _COMMON | {"set_alpha_to_one": False, "timestep_spacing": "leading"}
_EULER = _COMMON | _SIGMAS | {
    "interpolation_type": "linear",
    "sigma_min": None,
    "sigma_max": None,
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
    "rescale_betas_zero_snr": False,
}
_EULER_ANCESTRAL = _COMMON | {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False}
_DPM = _COMMON | _THRESHOLDING | _SIGMAS | {
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "lambda_min_clipped": -float("inf"),
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
    "algorithm_type": "dpmsolver++",
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "variance_type": None,
    "use_dynamic_shifting": False,
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "solver_order": (1, 2),
    "solver_type": ("midpoint", "heun"),
    "algorithm_type": ("dpmsolver++",),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "variance_type": (None,),
    "use_dynamic_shifting": (False,),
}


def _options(config: SchedulerConfig, known: Options) -> Options:
    """The class's options: the config's where it sets them, else the class's defaults."""
    options = known | {name: value for name, value in config.fields if name in known}
    for name, allowed in _ALLOWED.items():
        if name in options and options[name] not in allowed:
            raise InputError(
                f"scheduler_config.json: {name} is {options[name]!r}, supported are {', '.join(map(repr, allowed))}: "
                "choose another --sampler"
            )
    return options


def _checked(config: SchedulerConfig, known: Options, steps: int, refused_predictions: tuple[str, ...] = ()) -> Options:
    options = _options(config, known)
    if not 1 <= steps <= options["num_train_timesteps"]:
        raise InputError(f"steps is {steps}, expected 1 to {options['num_train_timesteps']}")
    if options["prediction_type"] in refused_predictions:
        raise InputError(
            f"prediction_type is {options['prediction_type']!r}, which this sampler does not have: choose another "
            "--sampler"
        )
    if options.get("rescale_betas_zero_snr") and options["prediction_type"] == "epsilon":
        raise InputError(
            "rescale_betas_zero_snr with prediction_type 'epsilon' divides by zero: expected a v_prediction checkpoint"
        )
    return options


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels and timesteps.


def alphas_cumprod(options: Mapping[str, Any]) -> Float[np.ndarray, " T"]:
    """The share of the picture left at each training timestep, rounded to float32 wherever PyTorch rounds.

    1 - a is read later, and loses four digits to that rounding near a = 1: it has to be the same rounding.
    """
    count = options["num_train_timesteps"]
    start, end = options["beta_start"], options["beta_end"]
    if options["trained_betas"] is not None:
        betas = np.asarray(options["trained_betas"], np.float32)
    elif options["beta_schedule"] == "linear":
        betas = np.linspace(start, end, count).astype(np.float32)
    elif options["beta_schedule"] == "scaled_linear":
        betas = np.square(np.linspace(start**0.5, end**0.5, count).astype(np.float32))
    else:  # squaredcos_cap_v2, Nichol and Dhariwal 2021, eq. 17
        edges = np.cos((np.linspace(0, 1, count + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999).astype(np.float32)
    if options.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(a) so that nothing of the picture is left at the end (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32))
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    squares = np.square(roots)
    return np.float32(1) - np.concatenate([squares[:1], squares[1:] / squares[:-1]])


def _spaced_timesteps(options: Options, steps: int) -> Float[np.ndarray, " steps"]:
    """Timesteps from noisy to clean, not rounded (Lin et al. 2023, table 2)."""
    count, spacing = options["num_train_timesteps"], options["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1]
    if spacing == "trailing":
        return np.round(np.arange(count, 0, -count / steps)) - 1
    return np.arange(steps)[::-1] * (count // steps) + options["steps_offset"]


def _check_range(timesteps: np.ndarray, options: Options) -> None:
    if timesteps.max() > options["num_train_timesteps"] - 1:
        raise InputError(
            f"{len(timesteps)} steps with steps_offset {options['steps_offset']} reach past the last training timestep "
            f"{options['num_train_timesteps'] - 1}: take fewer steps"
        )


def _schedule(timesteps: np.ndarray, init_noise_sigma: float = 1.0, input_scale: Any = 1.0, **arrays: Any) -> Schedule:
    def as_float32(array: Any) -> np.ndarray:
        return np.asarray(array, np.float32)

    scale = np.broadcast_to(as_float32(input_scale), timesteps.shape)
    return Schedule(
        as_float32(timesteps), scale, as_float32(init_noise_sigma), {k: as_float32(v) for k, v in arrays.items()}
    )


def _no_karras(name: str, karras: bool) -> None:
    if karras:
        raise InputError(f"karras goes with the sampler dpm++2m, found {name}: leave it out or change the sampler")


def _no_history(x: Latents) -> History:
    return ()


# ---------------------------------------------------------------------------------------------------------------------
# DDIM


def _ddim_schedule(config: SchedulerConfig, steps: int, *, karras: bool = False) -> Schedule:
    _no_karras("ddim", karras)
    options = _checked(config, _DDIM, steps)
    alphas = alphas_cumprod(options).astype(np.float64)
    timesteps = np.round(_spaced_timesteps(options, steps)).astype(int)
    _check_range(timesteps, options)
    before = timesteps - options["num_train_timesteps"] // steps
    last = 1.0 if options["set_alpha_to_one"] else alphas[0]
    return _schedule(timesteps, alpha=alphas[timesteps], alpha_next=np.where(before >= 0, alphas[before], last))


def _ddim_step(
    config: SchedulerConfig, schedule: Schedule, i: Array, x: Latents, output: Latents, history: History,
    noise: Latents, eta: Array,
) -> tuple[Latents, History]:  # fmt: skip
    """Song et al. 2021 ("Denoising Diffusion Implicit Models"), eqs. 12 and 16."""
    options = _options(config, _DDIM)
    a, a_next = schedule.arrays["alpha"][i], schedule.arrays["alpha_next"][i]
    sample, direction = _sample_and_noise(options["prediction_type"], x, output, jnp.sqrt(a), jnp.sqrt(1 - a))
    if options["thresholding"]:
        sample = _threshold(sample, options)
    elif options["clip_sample"]:
        sample = jnp.clip(sample, -options["clip_sample_range"], options["clip_sample_range"])
    variance = (1 - a_next) / (1 - a) * (1 - a / a_next)
    sigma = eta * jnp.sqrt(jnp.maximum(variance, 0))
    direction = jnp.sqrt(jnp.maximum(1 - a_next - sigma**2, 0)) * direction
    return jnp.sqrt(a_next) * sample + direction + sigma * noise, history


def _sample_and_noise(
    prediction_type: str, x: Latents, output: Latents, alpha: Array, sigma: Array
) -> tuple[Latents, Latents]:
    """x_0 and the noise in x = alpha x_0 + sigma noise, from what the UNet predicts (Salimans and Ho 2022, app. D)."""
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (x - alpha * output) / sigma
    return alpha * x - sigma * output, alpha * output + sigma * x


def _threshold(sample: Latents, options: Options) -> Latents:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3)."""
    sizes = jnp.abs(sample).reshape(sample.shape[0], -1)
    bound = jnp.quantile(sizes, options["dynamic_thresholding_ratio"], axis=1)
    bound = jnp.clip(bound, 1.0, options["sample_max_value"]).reshape(-1, *[1] * (sample.ndim - 1))
    return jnp.clip(sample, -bound, bound) / bound


# ---------------------------------------------------------------------------------------------------------------------
# PNDM, without the Runge-Kutta steps: PLMS


def _pndm_schedule(config: SchedulerConfig, steps: int, *, karras: bool = False) -> Schedule:
    _no_karras("pndm", karras)
    options = _checked(config, _PNDM, steps, refused_predictions=("sample",))
    alphas = alphas_cumprod(options).astype(np.float64)
    timesteps = np.round(_spaced_timesteps(options, steps)).astype(int)
    stride = options["num_train_timesteps"] // steps
    # The second timestep is evaluated twice: the first step is taken again with the mean of both its ends' outputs.
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    current, following = timesteps.copy(), timesteps - stride
    current[1:2], following[1:2] = timesteps[1:2] + stride, timesteps[1:2]
    _check_range(current, options)
    last = 1.0 if options["set_alpha_to_one"] else alphas[0]
    weights = np.zeros((max(len(timesteps), 4), 4))
    weights[:4] = [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]]
    weights[4:] = np.array([55, -59, 37, -9]) / 24
    return _schedule(
        timesteps,
        alpha=alphas[current],
        alpha_next=np.where(following >= 0, alphas[following], last),
        weights=weights[: len(timesteps)],
    )


def _pndm_init(x: Latents) -> History:
    return jnp.zeros((3, *x.shape), x.dtype), x


def _pndm_step(
    config: SchedulerConfig, schedule: Schedule, i: Array, x: Latents, output: Latents, history: History,
    noise: Latents, eta: Array,
) -> tuple[Latents, History]:  # fmt: skip
    """Liu et al. 2022 ("Pseudo Numerical Methods for Diffusion Models"), eqs. 9 to 11 with linear multistep eq. 12."""
    outputs, first_x = history
    recent = jnp.concatenate([output[None], outputs])
    combined = jnp.tensordot(schedule.arrays["weights"][i], recent, 1, precision=jax.lax.Precision.HIGHEST)
    repeats = i == 1
    x = jnp.where(repeats, first_x, x)
    history = jnp.where(repeats, outputs, recent[:3]), first_x
    a, a_next = schedule.arrays["alpha"][i], schedule.arrays["alpha_next"][i]
    if _options(config, _PNDM)["prediction_type"] == "v_prediction":
        combined = jnp.sqrt(a) * combined + jnp.sqrt(1 - a) * x
    denominator = a * jnp.sqrt(1 - a_next) + jnp.sqrt(a * (1 - a) * a_next)
    return jnp.sqrt(a_next / a) * x - (a_next - a) * combined / denominator, history


# ---------------------------------------------------------------------------------------------------------------------
# Euler and Euler ancestral


def _sigmas(alphas: np.ndarray, zero_snr: bool) -> Float[np.ndarray, " T"]:
    """sqrt((1 - a) / a) at every training timestep, in PyTorch's float32; the last one finite."""
    alphas = alphas.astype(np.float32)
    if zero_snr:
        alphas[-1] = 2.0**-24
    return np.sqrt((np.float32(1) - alphas) / alphas)


def _respaced(options: Options, sigmas: np.ndarray, ends: np.ndarray, steps: int) -> np.ndarray | None:
    """Noise levels spaced as Karras et al. 2022 (eq. 5), exponentially, or by a beta distribution; None if neither."""
    chosen = [name for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if options[name]]
    if not chosen:
        return None
    if len(chosen) > 1:
        raise InputError(f"scheduler_config.json: {' and '.join(chosen)} are both set, expected one of them")
    low, high = (
        float(end) if options.get(name) is None else options[name]
        for name, end in (("sigma_min", ends[-1]), ("sigma_max", ends[0]))
    )
    ramp = np.linspace(0, 1, steps)
    if chosen == ["use_karras_sigmas"]:
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if chosen == ["use_exponential_sigmas"]:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    # Slow to import, and seldom needed.
    import scipy.stats

    return low + (high - low) * scipy.stats.beta.ppf(1 - ramp, 0.6, 0.6)


def _timesteps_of(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The timesteps, fractions included, at which the training noise levels in `table` reach `sigmas`."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table)))


def _final_sigma(options: Options, table: np.ndarray) -> float:
    return 0.0 if options["final_sigmas_type"] == "zero" else float(table[0])


def _euler_schedule(config: SchedulerConfig, steps: int, *, karras: bool = False) -> Schedule:
    _no_karras("euler", karras)
    options = _checked(config, _EULER, steps)
    table = _sigmas(alphas_cumprod(options), options["rescale_betas_zero_snr"])
    timesteps = _spaced_timesteps(options, steps).astype(np.float32)
    if options["interpolation_type"] == "linear":
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
    else:
        sigmas = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), steps + 1))
    respaced = _respaced(options, sigmas, sigmas, steps)
    if respaced is not None:
        sigmas, timesteps = respaced, _timesteps_of(respaced, table)
    if options["timestep_type"] == "continuous" and options["prediction_type"] == "v_prediction":
        timesteps = 0.25 * np.log(sigmas)
    return _sigma_schedule(options, timesteps, np.append(sigmas, _final_sigma(options, table)))


def _euler_ancestral_schedule(config: SchedulerConfig, steps: int, *, karras: bool = False) -> Schedule:
    _no_karras("euler-a", karras)
    options = _checked(config, _EULER_ANCESTRAL, steps, refused_predictions=("sample",))
    table = _sigmas(alphas_cumprod(options), options["rescale_betas_zero_snr"])
    timesteps = _spaced_timesteps(options, steps).astype(np.float32)
    sigmas = np.append(np.interp(timesteps, np.arange(len(table)), table), 0.0)
    schedule = _sigma_schedule(options, timesteps, sigmas)
    now, after = sigmas[:-1], sigmas[1:]
    up = np.sqrt(after**2 * (now**2 - after**2) / now**2)
    return schedule._replace(
        arrays=schedule.arrays
        | {"sigma_next": np.float32(np.sqrt(after**2 - up**2)), "sigma_up": np.float32(up)}
    )


def _sigma_schedule(options: Options, timesteps: np.ndarray, sigmas: np.ndarray) -> Schedule:
    sigmas = sigmas[: len(timesteps) + 1].astype(np.float32).astype(np.float64)
    largest = sigmas.max()
    leading = options["timestep_spacing"] == "leading"
    return _schedule(
        timesteps,
        init_noise_sigma=np.sqrt(largest**2 + 1) if leading else largest,
        input_scale=1 / np.sqrt(sigmas[:-1] ** 2 + 1),
        sigma=sigmas[:-1],
        sigma_next=sigmas[1:],
    )


def _euler_step(
    config: SchedulerConfig, schedule: Schedule, i: Array, x: Latents, output: Latents, history: History,
    noise: Latents, eta: Array,
) -> tuple[Latents, History]:  # fmt: skip
    """Karras et al. 2022 ("Elucidating the Design Space"), algorithm 1 without its second-order correction."""
    sigma, sigma_next = schedule.arrays["sigma"][i], schedule.arrays["sigma_next"][i]
    slope = (x - _denoised(_options(config, _EULER), x, output, sigma)) / sigma
    return x + (sigma_next - sigma) * slope, history


def _euler_ancestral_step(
    config: SchedulerConfig, schedule: Schedule, i: Array, x: Latents, output: Latents, history: History,
    noise: Latents, eta: Array,
) -> tuple[Latents, History]:  # fmt: skip
    """An Euler step past the next level, and fresh noise back up to it (k-diffusion's ancestral sampling)."""
    x, history = _euler_step(config, schedule, i, x, output, history, noise, eta)
    return x + schedule.arrays["sigma_up"][i] * noise, history


def _denoised(options: Options, x: Latents, output: Latents, sigma: Array) -> Latents:
    """x_0 in x = x_0 + sigma noise."""
    if options["prediction_type"] == "epsilon":
        return x - sigma * output
    if options["prediction_type"] == "sample":
        return output
    return x / (sigma**2 + 1) - sigma / jnp.sqrt(sigma**2 + 1) * output


# ---------------------------------------------------------------------------------------------------------------------
# DPM-Solver++ 2M


def _dpm_schedule(config: SchedulerConfig, steps: int, *, karras: bool = False) -> Schedule:
    options = _checked(config, _DPM, steps)
    if karras:
        options |= {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    alphas = alphas_cumprod(options)
    table = _sigmas(alphas, options["rescale_betas_zero_snr"])
    respaced = _respaced(options, table, table[::-1], steps)
    if respaced is None:
        timesteps = _dpm_timesteps(options, alphas, steps)
        _check_range(timesteps, options)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
    else:
        sigmas, timesteps = respaced, _timesteps_of(respaced, table)
        if options["use_karras_sigmas"] and options["beta_schedule"] != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = timesteps.astype(int)
    sigmas = np.append(sigmas, _final_sigma(options, table)).astype(np.float32).astype(np.float64)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return _schedule(
        timesteps, alpha=alpha[:-1], sigma=(sigmas * alpha)[:-1], weights=_dpm_weights(options, sigmas, alpha)
    )


def _dpm_timesteps(options: Options, alphas: np.ndarray, steps: int) -> np.ndarray:
    log_snr = (np.log(np.sqrt(alphas)) - np.log(np.sqrt(np.float32(1) - alphas)))[::-1]
    if options["rescale_betas_zero_snr"]:
        log_snr[0] = -np.inf
    # The noisiest levels are left out where the configuration says so.
    last = options["num_train_timesteps"] - int(np.searchsorted(log_snr, options["lambda_min_clipped"]))
    if options["timestep_spacing"] == "linspace":
        timesteps = np.round(np.linspace(0, last - 1, steps + 1))[::-1][:-1]
    elif options["timestep_spacing"] == "leading":
        timesteps = (np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1] + options["steps_offset"]
    else:
        timesteps = np.round(np.arange(last, 0, -options["num_train_timesteps"] / steps)) - 1
    return timesteps.astype(int)


def _dpm_weights(options: Options, sigmas: np.ndarray, alpha: np.ndarray) -> Float[np.ndarray, "E 3"]:
    """The next latents as a sum of the latents and the two last predictions (Lu et al. 2022, algorithm 2)."""
    count = len(sigmas) - 1
    few = count < 15 and options["lower_order_final"]
    first_order_end = options["euler_at_final"] or few or options["final_sigmas_type"] == "zero"
    weights = np.zeros((count, 3))
    for i in range(count):
        with np.errstate(divide="ignore"):
            h, h_before = np.log(sigmas[i] / sigmas[i + 1]), np.log(sigmas[i - 1] / sigmas[i])
        grown = -np.expm1(-h) * alpha[i + 1]
        weights[i] = [sigmas[i + 1] * alpha[i + 1] / (sigmas[i] * alpha[i]), grown, 0]
        if options["solver_order"] == 2 and i > 0 and not (i == count - 1 and first_order_end):
            midpoint = options["solver_type"] == "midpoint"
            slope = grown / 2 if midpoint else alpha[i + 1] - grown / h
            weights[i] += np.array([0, 1, -1]) * slope * h / h_before
    return weights


def _dpm_init(x: Latents) -> History:
    return jnp.zeros_like(x)


def _dpm_step(
    config: SchedulerConfig, schedule: Schedule, i: Array, x: Latents, output: Latents, history: History,
    noise: Latents, eta: Array,
) -> tuple[Latents, History]:  # fmt: skip
    """Lu et al. 2022 ("DPM-Solver++"), algorithm 2; its midpoint and Heun forms differ in the weights alone."""
    options = _options(config, _DPM)
    alpha, sigma = schedule.arrays["alpha"][i], schedule.arrays["sigma"][i]
    sample, _ = _sample_and_noise(options["prediction_type"], x, output, alpha, sigma)
    if options["thresholding"]:
        sample = _threshold(sample, options)
    weights = schedule.arrays["weights"][i]
    return weights[0] * x + weights[1] * sample + weights[2] * history, sample


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(_ddim_schedule, _no_history, _ddim_step, stochastic=True),
    "pndm": Sampler(_pndm_schedule, _pndm_init, _pndm_step, stochastic=False),
    "euler": Sampler(_euler_schedule, _no_history, _euler_step, stochastic=False),
    "euler-a": Sampler(_euler_ancestral_schedule, _no_history, _euler_ancestral_step, stochastic=True),
    "dpm++2m": Sampler(_dpm_schedule, _dpm_init, _dpm_step, stochastic=False),
}
