"""What the class in a scheduler's file says: which sampler it is, and whether the model was made for a few steps."""

from sdipc_jax.errors import InputError
from sdipc_jax.samplers.methods import SAMPLERS
from sdipc_jax.samplers.noise_levels import FILE, SchedulerConfig

# What stands for the class of the scheduler's file where a sampler is named.
CHECKPOINT = "checkpoint"
_CLASSES = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
# Those of plain Stable Diffusion, which the paper samples with DDIM.
_PLAIN = ("ddim", "pndm")


def sampler_of_class(config: SchedulerConfig) -> str:
    """The sampler that the file names by its class.

    Raises:
        InputError: it names none, one that is not built, or one with options that are not.
    """
    found = class_of(config)
    name = _CLASSES.get(found)
    if name is None:
        raise InputError(
            f"{FILE}: _class_name is {found or None!r}, expected one of {', '.join(_CLASSES)}: name another sampler"
        )
    SAMPLERS[name].schedule(config, 1)
    return name


def class_of(config: SchedulerConfig) -> str:
    """The class that the file names, whichever library it was written for; empty if none."""
    return str(config.to_json().get("_class_name") or "").removeprefix("Flax")


def default_sampler(config: SchedulerConfig) -> str:
    """The class's own where a model needs it; DDIM for plain Stable Diffusion, and where the class is not built."""
    try:
        name = sampler_of_class(config)
    except InputError:
        return "ddim"
    return "ddim" if name in _PLAIN else name


def chosen_sampler(config: SchedulerConfig, name: str) -> str:
    """The sampler of a name, which may be `checkpoint`.

    Raises:
        InputError: there is no such sampler, or none for the file's class.
    """
    if name == CHECKPOINT:
        return sampler_of_class(config)
    if name not in SAMPLERS:
        raise InputError(f"sampler is {name!r}, expected one of {', '.join((*SAMPLERS, CHECKPOINT))}")
    return name


def is_for_few_steps(config: SchedulerConfig) -> bool:
    """Whether the file is one of a model that was distilled to a few steps.

    That is LCM's or TCD's class, or one of Euler's with trailing timesteps (SD-Turbo, SDXL-Turbo, Lightning). Models
    of v-prediction, or trained to zero terminal SNR, have trailing timesteps too, and take as many steps as any other.
    """
    values = config.to_json()
    of_any_length = values.get("prediction_type") == "v_prediction" or values.get("rescale_betas_zero_snr")
    trailing = values.get("timestep_spacing") == "trailing" and not of_any_length
    found = class_of(config)
    return found in ("LCMScheduler", "TCDScheduler") or (trailing and found.startswith("Euler"))
