"""What scheduler_config.json says: the noise levels that a model was trained with, and which of them a run visits.

All of this happens on the host, in NumPy. `alpha_bar` is the square of alpha in x = alpha * x0 + sqrt(1 - alpha^2) *
noise; `sigma` is the ratio of noise to signal there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from jaxtyping import Float, Float32, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdipc_jax.errors import InputError

FILE = "scheduler_config.json"

Spacing = Literal["leading", "linspace", "trailing"]


@dataclass(frozen=True)
class SchedulerConfig:
    """A checkpoint's scheduler_config.json, kept as it is: what a missing field means depends on the sampler.

    Attributes:
        text: the JSON object with sorted keys, which makes configurations hashable and comparable.
    """

    text: str = "{}"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SchedulerConfig":
        """Keeps all that is present, the fields of other classes included. Samplers read it when they are used."""
        return cls(json.dumps(dict(values), sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` was given."""
        return json.loads(self.text)

    @property
    def num_train_timesteps(self) -> Any:
        """As every class of diffusers reads it; a sampler judges whether it is a number."""
        return self.to_json().get("num_train_timesteps", Options.model_fields["num_train_timesteps"].default)


class Options(BaseModel):
    """What every class of diffusers reads, with its defaults and the values that are supported here.

    The subclasses are one for each sampler. A field that is not listed is ignored, as by the class in diffusers.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    sampler: ClassVar[str]

    num_train_timesteps: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    beta_start: Annotated[float, Field(ge=0, le=1)] = 0.0001
    beta_end: Annotated[float, Field(ge=0, le=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: list[float] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: Annotated[int, Field(ge=0)] = 0


class ThresholdOptions(BaseModel):
    """Dynamic thresholding of x0."""

    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, Field(ge=0, le=1)] = 0.995
    sample_max_value: float = 1.0


class SigmaOptions(Options):
    """Of the classes that count in sigmas."""

    timestep_spacing: Spacing = "linspace"
    rescale_betas_zero_snr: bool = False


class RespacingOptions(SigmaOptions):
    """Of the classes that may choose their sigmas freely."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    # DPMSolverMultistepScheduler does not list these two, but reads them where a file has them.
    sigma_min: Annotated[float, Field(gt=0)] | None = None
    sigma_max: Annotated[float, Field(gt=0)] | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class DDIMOptions(Options, ThresholdOptions):
    """DDIMScheduler."""

    sampler = "ddim"
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False


class PNDMOptions(Options):
    """PNDMScheduler. The Runge-Kutta steps are skipped whatever skip_prk_steps says."""

    sampler = "pndm"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    set_alpha_to_one: bool = False


class EulerOptions(RespacingOptions):
    """EulerDiscreteScheduler."""

    sampler = "euler"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"


class EulerAncestralOptions(SigmaOptions):
    """EulerAncestralDiscreteScheduler."""

    sampler = "euler-a"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class DPMSolverOptions(RespacingOptions, ThresholdOptions):
    """DPMSolverMultistepScheduler. flow_shift and time_shift_type say nothing without flow sigmas."""

    sampler = "dpm++2m"
    algorithm_type: Literal["dpmsolver++"] = "dpmsolver++"
    # logrho, bh1 and bh2 come from the files of other solvers and stand for midpoint.
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    solver_order: Literal[1, 2] = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: Annotated[float, Field(allow_inf_nan=True)] = -np.inf
    use_lu_lambdas: bool = False
    use_flow_sigmas: Literal[False] = False
    use_dynamic_shifting: Literal[False] = False
    variance_type: None = None


class ConsistencyOptions(Options):
    """Of the classes for models that were distilled on a grid of `original_inference_steps` timesteps."""

    beta_start: Annotated[float, Field(ge=0, le=1)] = 0.00085
    beta_end: Annotated[float, Field(ge=0, le=1)] = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    original_inference_steps: Annotated[int, Field(ge=1)] = 50
    rescale_betas_zero_snr: bool = False


class LCMOptions(ConsistencyOptions, ThresholdOptions):
    """LCMScheduler. Its grid takes no notice of timestep_spacing and steps_offset, nor of set_alpha_to_one."""

    sampler = "lcm"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    timestep_scaling: float = 10.0


class TCDOptions(ConsistencyOptions):
    """TCDScheduler. It lists clip_sample and thresholding too, and its step does neither."""

    sampler = "tcd"


AnyOptions = TypeVar("AnyOptions", bound=Options)


def read_options(kind: type[AnyOptions], config: SchedulerConfig, steps: int, karras: bool = False) -> AnyOptions:
    """Reads the file as one class does.

    Args:
        steps: how many the run has.
        karras: turns use_karras_sigmas on, for dpm++2m.

    Raises:
        InputError: a field has a value that is not supported, or the run does not fit the model.
    """
    values = config.to_json()
    # diffusers lists here what no one chose: what is in the file only because it was some class's default.
    for name in values.pop("_use_default_values", ()):
        values.pop(name, None)
    if karras:
        if kind is not DPMSolverOptions:
            raise InputError(f"karras is on, but {kind.sampler} has no such option: use dpm++2m or leave it out")
        values["use_karras_sigmas"] = True
    try:
        options = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        supported = first.get("ctx", {}).get("expected") or first["msg"].removeprefix("Input should be ")
        raise InputError(
            f"{FILE}: {first['loc'][0]} is {first['input']!r}, sdipc supports {supported} with {kind.sampler}: "
            "correct the file or use another sampler"
        ) from None
    if not 1 <= steps <= options.num_train_timesteps:
        raise InputError(f"steps is {steps}, expected 1 to {options.num_train_timesteps}, as the model was trained")
    betas = options.trained_betas
    if betas is not None and len(betas) != options.num_train_timesteps:
        raise InputError(
            f"{FILE}: trained_betas has {len(betas)} entries, expected {options.num_train_timesteps} "
            "(num_train_timesteps): correct the file"
        )
    return options


def alpha_bars(options: Options, *, zero_snr: bool = False) -> Float32[np.ndarray, " T"]:
    """The product of 1 - beta up to each timestep.

    In float32, operation by operation, because PyTorch's roundings are part of what models were trained with, and of
    the order of 1e-5 near zero signal (Lin et al. 2024, Algorithm 1, if `zero_snr`).
    """
    count, start, end = options.num_train_timesteps, options.beta_start, options.beta_end
    if options.trained_betas is not None:
        betas = np.asarray(options.trained_betas, np.float32)
    elif options.beta_schedule == "linear":
        betas = _linspace(start, end, count)
    elif options.beta_schedule == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, count) ** 2
    else:
        cosine = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999).astype(np.float32)
    if zero_snr:
        root = np.sqrt(_cumulative_product(1 - betas))
        first, last = root[0], root[-1]
        rescaled = ((root - last) * (first / (first - last))) ** 2
        betas = 1 - np.append(rescaled[0], rescaled[1:] / rescaled[:-1])
    return _cumulative_product(1 - betas)


def _linspace(start: float, end: float, count: int) -> Float32[np.ndarray, " count"]:
    """From both ends to the middle in float32 steps, each rounded once, as PyTorch counts."""
    first, last = np.float64(np.float32(start)), np.float64(np.float32(end))
    step = np.float64(np.float32(last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)


def _cumulative_product(values: Float32[np.ndarray, " T"]) -> Float32[np.ndarray, " T"]:
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


def trained_sigmas(options: SigmaOptions) -> Float32[np.ndarray, " T"]:
    """sqrt((1 - alpha_bar) / alpha_bar) at each timestep, rising."""
    alpha_bar = alpha_bars(options, zero_snr=options.rescale_betas_zero_snr)
    sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
    if options.rescale_betas_zero_snr:
        # diffusers takes 2^-24 for the alpha_bar that is 0.
        sigmas[-1] = 2.0**12
    return sigmas


def spaced_timesteps(options: Options, steps: int, *, below: int, spare: int = 0) -> Float[np.ndarray, " n"]:
    """Timesteps under `below`, falling, not rounded (Lin et al. 2024, Table 2).

    Args:
        spare: how many to leave out at the lower end.

    Returns:
        `steps` of them. Trailing ones may be one more, where rounding leaves a rest of num_train_timesteps / steps:
        diffusers then ends with timestep -1, and so does this.
    """
    if options.timestep_spacing == "trailing":
        return np.round(np.arange(below, 0, -options.num_train_timesteps / steps)) - 1
    points = steps + spare
    if options.timestep_spacing == "leading":
        return (np.arange(points)[::-1] * (below // points) + options.steps_offset)[:steps].astype(np.float64)
    return np.linspace(0, below - 1, points)[::-1][:steps]


def distilled_timesteps(options: ConsistencyOptions, steps: int) -> Int[np.ndarray, " steps"]:
    """Every so many of the timesteps that a consistency model was distilled on, falling from the highest.

    Raises:
        InputError: the grid has fewer timesteps than the run, or more than there are.
    """
    grid, count = options.original_inference_steps, options.num_train_timesteps
    if grid > count:
        raise InputError(
            f"{FILE}: original_inference_steps is {grid}, expected 1 to {count} (num_train_timesteps): correct the file"
        )
    if steps > grid:
        raise InputError(
            f"steps is {steps}, expected 1 to {grid} with {options.sampler} (original_inference_steps): use fewer"
        )
    places = np.floor(np.linspace(0, grid, steps, endpoint=False)).astype(int)
    return (np.arange(grid, 0, -1) * (count // grid) - 1)[places]


def respaced_sigmas(
    options: RespacingOptions, sigmas: Float[np.ndarray, " n"], steps: int
) -> Float[np.ndarray, " steps"] | None:
    """Noise levels between the ends of `sigmas`, falling; None where the file asks for none.

    Karras et al. 2022, eq. 5 with rho = 7; or even in log sigma; or quantiles of Beta(0.6, 0.6), Lee et al. 2024.
    """
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    chosen = [name for name in names if getattr(options, name)]
    if len(chosen) > 1:
        raise InputError(f"{FILE}: {' and '.join(chosen)} are True, expected at most one of them: correct the file")
    high = float(sigmas[0]) if options.sigma_max is None else options.sigma_max
    low = float(sigmas[-1]) if options.sigma_min is None else options.sigma_min
    if options.use_karras_sigmas:
        return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    if isinstance(options, DPMSolverOptions) and options.use_lu_lambdas:
        first, last = np.log(sigmas[[0, -1]]).astype(np.float64)
        return np.exp(np.linspace(first, last, steps))
    if options.use_exponential_sigmas:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    if options.use_beta_sigmas:
        # Slow to import, for a choice that few make.
        from scipy.special import betaincinv

        return low + betaincinv(0.6, 0.6, np.linspace(1, 0, steps)) * (high - low)
    return None


def timesteps_of(sigmas: Float[np.ndarray, " n"], trained: Float32[np.ndarray, " T"]) -> Float[np.ndarray, " n"]:
    """Where noise levels lie among the trained ones, linear in log sigma."""
    return np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))


def with_last(
    options: RespacingOptions, sigmas: Float[np.ndarray, " n"], trained: Float32[np.ndarray, " T"]
) -> Float32[np.ndarray, " n+1"]:
    """Adds the level at which the last step ends, and rounds to float32."""
    return np.append(sigmas, trained[0] if options.final_sigmas_type == "sigma_min" else 0).astype(np.float32)
