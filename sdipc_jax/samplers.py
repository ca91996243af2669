"""Samplers: how the model's output at one noise level turns latents into those of the next.

A sampler is a triple of functions. `schedule` runs on the host and turns scheduler_config.json into arrays with one
entry for each evaluation of the model; `init` makes the history that a multistep method carries; `step` is pure,
reads nothing but these arrays, and its index may be traced. Each sampler behaves as diffusers' class for the method
does when it is made from the same file.

Latents are x = alpha * x0 + sigma * noise. alpha^2 + sigma^2 is 1, but for Euler's methods: there alpha is 1, and the
model is shown x / sqrt(1 + sigma^2). `alpha_bar` is the square of the first kind's alpha.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import betaincinv

from sdipc_jax.errors import InputError

_FILE = "scheduler_config.json"


@dataclass(frozen=True)
class SchedulerConfig:
    """A checkpoint's scheduler_config.json, kept as it is: what a missing field means depends on the sampler.

    Attributes:
        text: the JSON object with sorted keys, which makes configurations hashable and comparable.
    """

    text: str = "{}"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SchedulerConfig":
        """Keeps all that is present, the fields of other classes included. It is read by `Sampler.schedule`."""
        return cls(json.dumps(dict(values), sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` was given."""
        return json.loads(self.text)


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


class Sampler(NamedTuple):
    """A sampling method.

    Attributes:
        schedule: `schedule(config, steps, karras=False)` gives a Schedule of NumPy arrays, or raises InputError.
        step: `step(schedule, i, x, output, history, noise, eta)` gives the next x and history. `output` is the
            model's. `noise` has x's shape and unit variance; methods that are not stochastic take None. `eta` is
            DDIM's share of fresh noise; the others ignore it.
        init: `init(x)` gives the first history.
        stochastic: whether `step` reads `noise`.
    """

    schedule: Callable[..., Schedule]
    step: Callable[..., tuple[Float[Array, "N ..."], Any]]
    init: Callable[[Float[Array, "N ..."]], Any] = lambda x: ()
    stochastic: bool = False


# What the file may say: the fields that each class of diffusers reads, with its defaults and the values supported
# here. A field that is not listed is ignored, as it is there.


class _Options(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    sampler: ClassVar[str]

    num_train_timesteps: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    beta_start: Annotated[float, Field(ge=0, le=1)] = 0.0001
    beta_end: Annotated[float, Field(ge=0, le=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: list[float] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    steps_offset: Annotated[int, Field(ge=0)] = 0


class _ThresholdOptions(BaseModel):
    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, Field(ge=0, le=1)] = 0.995
    sample_max_value: float = 1.0


class _SigmaOptions(_Options):
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "linspace"
    rescale_betas_zero_snr: bool = False


class _RespacingOptions(_SigmaOptions):
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    # DPMSolverMultistepScheduler does not list these two, but reads them where a file has them.
    sigma_min: Annotated[float, Field(gt=0)] | None = None
    sigma_max: Annotated[float, Field(gt=0)] | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class _DDIMOptions(_Options, _ThresholdOptions):
    sampler = "ddim"
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False


class _PNDMOptions(_Options):
    """Without skip_prk_steps: the Runge-Kutta steps are skipped whatever it says."""

    sampler = "pndm"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    set_alpha_to_one: bool = False


class _EulerOptions(_RespacingOptions):
    sampler = "euler"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"


class _EulerAncestralOptions(_SigmaOptions):
    sampler = "euler-a"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class _DPMSolverOptions(_RespacingOptions, _ThresholdOptions):
    """Without flow_shift and time_shift_type, which are read with flow sigmas alone."""

    sampler = "dpm++2m"
    # deis, logrho, bh1 and bh2 come from the files of other solvers and stand for the defaults.
    algorithm_type: Literal["dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    solver_order: Literal[1, 2] = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: Annotated[float, Field(allow_inf_nan=True)] = -np.inf
    use_lu_lambdas: bool = False
    use_flow_sigmas: Literal[False] = False
    use_dynamic_shifting: Literal[False] = False
    variance_type: None = None


_AnyOptions = TypeVar("_AnyOptions", bound=_Options)


def _read(kind: type[_AnyOptions], config: SchedulerConfig, steps: int, karras: bool = False) -> _AnyOptions:
    values = config.to_json()
    # diffusers lists here what a file holds only because some class had it as a default.
    for name in values.get("_use_default_values", ()):
        values.pop(name, None)
    if karras and kind is not _DPMSolverOptions:
        raise InputError(f"karras is on, but {kind.sampler} has no such option: use dpm++2m or leave it out")
    if karras:
        values["use_karras_sigmas"] = True
    try:
        options = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        supported = first.get("ctx", {}).get("expected") or first["msg"].removeprefix("Input should be ")
        raise InputError(
            f"{_FILE}: {first['loc'][0]} is {first['input']!r}, {kind.sampler} supports {supported}: "
            "correct the file or use another sampler"
        ) from None
    if not 1 <= steps <= options.num_train_timesteps:
        raise InputError(f"steps is {steps}, expected 1 to {options.num_train_timesteps}, the model's own count")
    betas = options.trained_betas
    if betas is not None and len(betas) != options.num_train_timesteps:
        raise InputError(
            f"{_FILE}: trained_betas has {len(betas)} entries, expected num_train_timesteps = "
            f"{options.num_train_timesteps}: correct the file"
        )
    return options


def _alpha_bar(options: _Options, *, zero_snr: bool = False) -> np.ndarray:
    """The product of 1 - beta up to each timestep, (T,).

    In float32, step by step, because checkpoints were trained with PyTorch's roundings. Zero terminal SNR is
    Algorithm 1 of Lin et al. 2024, where rounding is up to 1e-5 of the result.
    """
    count, start, end = options.num_train_timesteps, options.beta_start, options.beta_end
    if options.trained_betas is not None:
        betas = np.asarray(options.trained_betas, np.float32)
    elif options.beta_schedule == "linear":
        betas = _linspace32(start, end, count)
    elif options.beta_schedule == "scaled_linear":
        betas = _linspace32(start**0.5, end**0.5, count) ** 2
    else:
        cosine = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999).astype(np.float32)
    if zero_snr:
        root = np.sqrt(_cumprod32(1 - betas))
        first, last = root[0], root[-1]
        rescaled = ((root - last) * (first / (first - last))) ** 2
        betas = 1 - np.concatenate([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    return _cumprod32(1 - betas)


def _linspace32(start: float, end: float, count: int) -> np.ndarray:
    """From both ends to the middle in float32 steps, each rounded once, as PyTorch counts."""
    first, last = np.float64(np.float32(start)), np.float64(np.float32(end))
    step = np.float64(np.float32(last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)


def _cumprod32(values: np.ndarray) -> np.ndarray:
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


def _sigmas(options: _SigmaOptions) -> np.ndarray:
    """Noise to signal at each timestep, rising, float32 (T,)."""
    alpha_bar = _alpha_bar(options, zero_snr=options.rescale_betas_zero_snr)
    sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
    if options.rescale_betas_zero_snr:
        # Where the signal is 0, diffusers takes 2^-24 for alpha_bar.
        sigmas[-1] = 2.0**12
    return sigmas


def _spaced(options: _Options, steps: int, *, below: int, spare: int = 0) -> np.ndarray:
    """Timesteps from under `below` down, not rounded (Lin et al. 2024, Table 2).

    `spare` points are left out at the lower end. Trailing timesteps may be one more than `steps`, where
    num_train_timesteps / steps is rounded down: diffusers then ends with -1, and so does this.
    """
    if options.timestep_spacing == "trailing":
        return np.round(np.arange(below, 0, -options.num_train_timesteps / steps)) - 1
    points = steps + spare
    if options.timestep_spacing == "leading":
        return (np.arange(points)[::-1] * (below // points) + options.steps_offset)[:steps]
    return np.linspace(0, below - 1, points)[::-1][:steps]


def _respaced(options: _RespacingOptions, sigmas: np.ndarray, steps: int) -> np.ndarray | None:
    """Noise levels between the ends of `sigmas`, falling, where the file asks for other ones than the timesteps'.

    Karras et al. 2022, eq. 5 with rho = 7; evenly in log sigma; or by the quantiles of Beta(0.6, 0.6), Lee et al. 2024.
    """
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    chosen = [name for name in names if getattr(options, name)]
    if len(chosen) > 1:
        raise InputError(f"{_FILE}: {' and '.join(chosen)} are True, expected one of them at most: correct the file")
    high = float(sigmas[0]) if options.sigma_max is None else options.sigma_max
    low = float(sigmas[-1]) if options.sigma_min is None else options.sigma_min
    if options.use_karras_sigmas:
        return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    if isinstance(options, _DPMSolverOptions) and options.use_lu_lambdas:
        return np.exp(np.linspace(np.log(sigmas[0]), np.log(sigmas[-1]), steps))
    if options.use_exponential_sigmas:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    if options.use_beta_sigmas:
        return low + betaincinv(0.6, 0.6, np.linspace(1, 0, steps)) * (high - low)
    return None


def _timesteps_of(sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Where the levels lie among the trained ones: linear in log sigma."""
    return np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))


def _preconditioning(prediction_type: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c_skip and c_out with which x0 = c_skip * x + c_out * output (Karras et al. 2022, eq. 7)."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def _finished(options: _Options, schedule: Schedule) -> Schedule:
    """Rounds to float32.

    Raises:
        InputError: a coefficient is not finite, or the first two timesteps are equal: diffusers finds its place among
            the sigmas by the first timestep, so that it would start with the second sigma and run past the last.
    """
    timesteps = schedule.timesteps
    if isinstance(options, _SigmaOptions) and len(timesteps) > 1 and timesteps[0] == timesteps[1]:
        problem = f"the first two timesteps are both {timesteps[0]:g}"
    elif not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(schedule)):
        problem = "some coefficients are not finite"
    else:
        return jax.tree.map(np.float32, schedule)
    raise InputError(
        f"{_FILE}: with {len(timesteps)} evaluations of {options.sampler}, {problem}: "
        "use fewer steps, another sampler, or other noise levels in the file"
    )


def _threshold(options: _ThresholdOptions) -> tuple[float, float] | None:
    return (options.dynamic_thresholding_ratio, options.sample_max_value) if options.thresholding else None


def _limited(schedule: Schedule, denoised: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    """Clips x0, or divides each picture by a percentile of its values (Saharia et al. 2022, section 2.3)."""
    if schedule.threshold is not None:
        ratio, largest = schedule.threshold
        bound = jnp.quantile(jnp.abs(denoised), ratio, axis=tuple(range(1, denoised.ndim)), keepdims=True)
        bound = jnp.clip(bound, 1, largest)
        return jnp.clip(denoised, -bound, bound) / bound
    return denoised if schedule.clip is None else jnp.clip(denoised, -schedule.clip, schedule.clip)


def _at(schedule: Schedule, i: Any) -> tuple[Array, ...]:
    return tuple(jnp.asarray(values)[i] for values in schedule.coefficients)


def _previous(
    options: _DDIMOptions | _PNDMOptions, alpha_bar: np.ndarray, timesteps: np.ndarray, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """alpha_bar at the timesteps and one stride below, float64 (n,) each."""
    if timesteps.max() >= len(alpha_bar):
        raise InputError(
            f"{_FILE}: steps_offset is {options.steps_offset}, which puts timestep {timesteps.max()} past "
            f"num_train_timesteps = {len(alpha_bar)}: use fewer steps"
        )
    alpha_bar = alpha_bar.astype(np.float64)
    below = timesteps - stride
    last = 1.0 if options.set_alpha_to_one else alpha_bar[0]
    return alpha_bar[timesteps], np.where(below < 0, last, alpha_bar[np.maximum(below, 0)])


@np.errstate(all="ignore")
def _ddim_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    options = _read(_DDIMOptions, config, steps, karras)
    count = options.num_train_timesteps
    timesteps = np.round(_spaced(options, steps, below=count)).astype(int)
    alpha_bar = _alpha_bar(options, zero_snr=options.rescale_betas_zero_snr)
    here, there = _previous(options, alpha_bar, timesteps, count // steps)
    if options.prediction_type == "epsilon" and not here.all():
        raise InputError(
            f"{_FILE}: rescale_betas_zero_snr is True and prediction_type 'epsilon', but at timestep "
            f"{timesteps[0]} x is all noise and tells nothing of x0: use a checkpoint with 'v_prediction'"
        )
    alpha, sigma, next_alpha, next_sigma = np.sqrt([here, 1 - here, there, 1 - there])
    fresh = np.sqrt(1 - here / there) / sigma
    schedule = Schedule(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        coefficients=(
            *_preconditioning(options.prediction_type, alpha, sigma), alpha, sigma, next_alpha, next_sigma, fresh
        ),
        clip=options.clip_sample_range if options.clip_sample else None,
        threshold=_threshold(options),
    )
    return _finished(options, schedule)


def _ddim_step(
    schedule: Schedule, i: Any, x: Array, output: Array, history: Any, noise: Array | None, eta: Any
) -> tuple[Array, Any]:
    """Song et al. 2021, eq. 12. The noise of eq. 16 is eta * fresh of all the noise that the next x has.

    The direction that points to x is that of x0 before clipping, as in diffusers.
    """
    c_skip, c_out, alpha, sigma, next_alpha, next_sigma, fresh = _at(schedule, i)
    denoised = c_skip * x + c_out * output
    direction = (x - alpha * denoised) / sigma
    share = eta * fresh
    x = next_alpha * _limited(schedule, denoised) + next_sigma * jnp.sqrt(1 - share**2) * direction
    return x + next_sigma * share * noise, history


# Adams-Bashforth weights for the newest to the oldest output; the second evaluation is explained below.
_ADAMS_BASHFORTH = (
    np.array([[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]], np.float64) / 24
)


@np.errstate(all="ignore")
def _pndm_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    """The second timestep comes twice, so there is one evaluation more than steps (if there are two steps or more).

    The first step ends where the second evaluation is made, and is then taken again, from its start, with the mean of
    both outputs. It is linear, so its start need not be kept: it is (x - weight * output) / keep of the first step.
    """
    options = _read(_PNDMOptions, config, steps, karras)
    count = options.num_train_timesteps
    timesteps = np.round(_spaced(options, steps, below=count)).astype(int)
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
    stride, starts = count // steps, timesteps.copy()
    starts[1:2] += stride
    here, there = _previous(options, _alpha_bar(options), starts, stride)
    keep = np.sqrt(there / here)
    weight = (here - there) / (here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there))
    if options.prediction_type == "v_prediction":
        keep, weight = keep + weight * np.sqrt(1 - here), weight * np.sqrt(here)
    weights = weight[:, None] * _ADAMS_BASHFORTH[np.minimum(np.arange(len(timesteps)), 4)]
    if len(timesteps) > 1:
        keep[1] /= keep[0]
        weights[1, 1] -= keep[1] * weight[0]
    ones = np.ones(len(timesteps))
    return _finished(options, Schedule(timesteps, 1.0, ones, (keep, weights)))


def _pndm_step(
    schedule: Schedule, i: Any, x: Array, output: Array, history: Any, noise: Array | None, eta: Any
) -> tuple[Array, Any]:
    """Liu et al. 2022, eqs. 9 and 12: the linear multistep method, with the last three outputs as history.

    The output of the repeated timestep does not enter the history.
    """
    keep, weights = _at(schedule, i)
    outputs = (output, *history)
    x = keep * x + sum(weight * past for weight, past in zip(weights, outputs, strict=True))
    return x, tuple(jnp.where(i == 1, old, new) for old, new in zip(history, outputs, strict=False))


@np.errstate(all="ignore")
def _euler_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    options = _read(_EulerOptions, config, steps, karras)
    trained = _sigmas(options)
    timesteps = np.float32(_spaced(options, steps, below=len(trained)))
    if options.interpolation_type == "log_linear":
        # One more than there are timesteps, so that the last step ends at the lowest sigma and not at 0.
        sigmas = np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), steps + 1))
    else:
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    respaced = _respaced(options, sigmas, steps)
    if respaced is not None:
        sigmas, timesteps = respaced, _timesteps_of(respaced, trained)
    sigmas = _ended(options, sigmas, trained)
    if options.timestep_type == "continuous" and options.prediction_type == "v_prediction":
        timesteps = np.log(sigmas[:-1]) / 4
    sigma, sigma_down = sigmas[: len(timesteps)], sigmas[1 : len(timesteps) + 1]
    return _finished(options, _variance_exploding(options, timesteps, sigma, sigma_down, ()))


def _ended(options: _RespacingOptions, sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """With the level at which the last step ends; float32, as PyTorch reads them."""
    return np.float32(np.append(sigmas, trained[0] if options.final_sigmas_type == "sigma_min" else 0))


def _variance_exploding(
    options: _SigmaOptions, timesteps: np.ndarray, sigma: np.ndarray, sigma_down: np.ndarray, extra: tuple[Any, ...]
) -> Schedule:
    """What both of Euler's methods read: each step goes from `sigma` to `sigma_down`."""
    alpha = 1 / np.sqrt(np.float64(sigma) ** 2 + 1)
    c_skip, c_out = _preconditioning(options.prediction_type, alpha, sigma * alpha)
    largest = np.float64(sigma.max())
    return Schedule(
        timesteps=timesteps,
        init_noise_sigma=np.sqrt(largest**2 + 1) if options.timestep_spacing == "leading" else largest,
        input_scale=alpha,
        coefficients=(c_skip * alpha, c_out, sigma, sigma_down, *extra),
    )


def _euler_step(
    schedule: Schedule, i: Any, x: Array, output: Array, history: Any, noise: Array | None, eta: Any
) -> tuple[Array, Any]:
    """Euler's method for dx/dsigma = (x - x0) / sigma (Karras et al. 2022, Algorithm 1 without its lines 6 to 8)."""
    c_skip, c_out, sigma, sigma_down, *_ = _at(schedule, i)
    derivative = (x - (c_skip * x + c_out * output)) / sigma
    return x + derivative * (sigma_down - sigma), history


@np.errstate(all="ignore")
def _euler_ancestral_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    options = _read(_EulerAncestralOptions, config, steps, karras)
    trained = _sigmas(options)
    timesteps = np.float32(_spaced(options, steps, below=len(trained)))
    sigmas = np.float32(np.append(np.interp(timesteps, np.arange(len(trained)), trained), 0))
    # In float32: at zero terminal SNR the first sigma_down is mostly rounding, and diffusers has it so.
    sigma, target = sigmas[:-1], sigmas[1:]
    sigma_up = np.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
    sigma_down = np.sqrt(target**2 - sigma_up**2)
    return _finished(options, _variance_exploding(options, timesteps, sigma, sigma_down, (sigma_up,)))


def _euler_ancestral_step(
    schedule: Schedule, i: Any, x: Array, output: Array, history: Any, noise: Array | None, eta: Any
) -> tuple[Array, Any]:
    """Euler's method to below the next level, then fresh noise up to it: Song et al. 2021, eq. 16 with eta = 1."""
    x, history = _euler_step(schedule, i, x, output, history, noise, eta)
    *_, sigma_up = _at(schedule, i)
    return x + sigma_up * noise, history


@np.errstate(all="ignore")
def _dpm_solver_schedule(config: SchedulerConfig, steps: int, karras: bool = False) -> Schedule:
    options = _read(_DPMSolverOptions, config, steps, karras)
    trained = _sigmas(options)
    respaced = _respaced(options, trained[::-1], steps)
    if respaced is None:
        # lambda = log(alpha / sigma); diffusers rounds its logarithms to float32.
        log_snr = -np.log(trained)
        kept = len(trained) - np.searchsorted(log_snr[::-1], np.float32(options.lambda_min_clipped))
        timesteps = np.round(_spaced(options, steps, below=kept, spare=1))
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    else:
        sigmas, timesteps = respaced, _timesteps_of(respaced, trained)
        rounded = (options.use_karras_sigmas or options.use_lu_lambdas) and options.beta_schedule != "squaredcos_cap_v2"
        timesteps = np.trunc(np.round(timesteps) if rounded else timesteps)
    sigmas = np.float64(_ended(options, sigmas, trained))
    alpha, ratio = 1 / np.sqrt(sigmas**2 + 1), sigmas[1:] / sigmas[:-1]
    alpha, next_alpha = alpha[:-1], alpha[1:]
    h = -np.log(ratio)
    # phi is 1 - e^-h. The second-order term is phi / 2 (midpoint) or 1 - phi / h (Heun), per step of the last h.
    phi = 1 - ratio
    curvature = 1 - phi / h if options.solver_type == "heun" else phi / 2
    correction = np.append(0, curvature[1:] * h[1:] / h[:-1])
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
            *_preconditioning(options.prediction_type, alpha, sigmas[:-1] * alpha),
            ratio * next_alpha / alpha,
            next_alpha * phi,
            next_alpha * correction,
        ),
        threshold=_threshold(options),
    )
    return _finished(options, schedule)


def _dpm_solver_step(
    schedule: Schedule, i: Any, x: Array, output: Array, history: Any, noise: Array | None, eta: Any
) -> tuple[Array, Any]:
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
