"""What a row asks for beside its pictures, its text and its seed: arrays for the device, by name.

Rows whose arrays have the same names and shapes run the same program, whatever stands in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.errors import InputError
from sdipc_jax.pictures.guiding import as_shown, covering, padded, what_is_redone, where_it_counts
from sdipc_jax.records import Record
from sdipc_jax.samplers import SAMPLERS
from sdipc_jax.sampling import weights
from sdipc_jax.sampling.start import first_evaluation
from sdipc_jax.settings import Defaults

# The pictures of a role, as they were read: names and pixels.
Pictures = Sequence[tuple[str, np.ndarray]]
Arrays = dict[str, np.ndarray]
Size = tuple[int, int]

_CONTROLS = ("control_scale", "control_start", "control_end")


@dataclass(frozen=True)
class Asked:
    """Arrays of one row, with the axis of rows to be added.

    Attributes:
        arrays: `evaluations` (evaluations,), `layers` (layers,), `places` (P, h, w) and `strengths` (P,) say when, in
            which layers, where and how much each of P prompts counts; `init` (H, W, 3) and `redone` (H, W) what is
            started from; `control` (K, H, W, 3), `control_scale`, `control_start` and `control_end` (K,) what is shown.
        strength: of the start. Static.
    """

    arrays: Mapping[str, np.ndarray]
    strength: float | None = None

    @property
    def program(self) -> tuple[Any, ...]:
        """What rows must have in common to be done together."""
        shapes = sorted((name, array.shape) for name, array in self.arrays.items())
        return (*shapes, *([] if self.strength is None else [self.strength]))


NOTHING = Asked({})


def settings_of(values: Mapping[str, Any], roles: Sequence[str], count: int) -> Record:
    """What the record of a row says of it: what has a meaning there.

    Args:
        values: the row's, completed by the job's.
        roles: of the row's pictures.
        count: of those that it is about.
    """
    names = [name for name in ("without", "pad") if values[name]]
    if (count > 1 and "mask" not in roles) or values["without"] or "without_picture" in roles:
        names.append("mean")
    if _weighted(values, roles):
        names += ["start", "end", "layers"]
    if values["strength"] is not None or {"init_image", "mask_image"} & set(roles):
        names.append("strength")
    if "control_image" in roles:
        names += [*_CONTROLS]
    return {name: list(value) if isinstance(value := values[name], tuple) else value for name in names}


def asked(
    config: Config,
    job: JobSettings,
    chosen: Defaults,
    values: Mapping[str, Any],
    size: Size,
    pictures: Mapping[str, Pictures],
    row_weights: Sequence[float],
) -> Asked:
    """A row's arrays.

    Args:
        chosen: steps and sampler.
        values: the row's, completed by the job's.
        pictures: by their role; `picture` has what the row is about.
        row_weights: of these.

    Raises:
        InputError: what is asked for does not fit together, or a mask is empty.
    """
    started, strength = _start(config, chosen, values, size, pictures)
    shown = _shown(job, values, size, pictures.get("control_image", ()))
    first = 0 if strength is None else first_evaluation(strength, chosen.steps)
    counted: Arrays = {}
    if _weighted(values, list(pictures)):
        schedule = SAMPLERS[chosen.sampler].schedule(config.scheduler, chosen.steps, karras=job.karras, first=first)
        known = weights.layer_names(config.unet)
        layers = known if values["layers"] == "all" else values["layers"].split(",")
        counted = {
            "evaluations": weights.over_steps(len(schedule.timesteps), values["start"], values["end"]).ravel(),
            "layers": weights.over_layers(config.unet, layers).ravel(),
        }
    if masks := pictures.get("mask", ()):
        if len(masks) > 1 and (values["without"] or "without_picture" in pictures):
            raise InputError("found both several masks and without, expected one of them: leave the other out")
        _, height, width = config.latent_shape(*size)
        counted["places"] = np.stack([where_it_counts(mask, name, size, (height, width)) for name, mask in masks])
        if len(masks) > 1:
            counted["strengths"] = np.asarray(row_weights, np.float32)
    if strength is not None and first:
        # One number for all strengths that leave as many steps.
        strength = (chosen.steps - first + 0.5) / chosen.steps
    return Asked(started | shown | counted, strength)


def _weighted(values: Mapping[str, Any], roles: Sequence[str]) -> bool:
    return "mask" in roles or (values["start"], values["end"], values["layers"]) != (0.0, 1.0, "all")


def _start(
    config: Config, chosen: Defaults, values: Mapping[str, Any], size: Size, pictures: Mapping[str, Pictures]
) -> tuple[Arrays, float | None]:
    named, masks, pad = pictures.get("init_image", ()), pictures.get("mask_image", ()), values["pad"]
    if not (named or masks or pad or values["strength"] is not None):
        if config.unet.repaints:
            raise InputError("this UNet was trained to repaint a part of a picture, expected a mask_image: give one")
        return {}, None
    if masks and pad:
        raise InputError("found both mask_image and pad, expected one of them: leave the other out")
    if config.unet.repaints and not (masks or pad):
        raise InputError("this UNet was trained to repaint a part of a picture, expected a mask_image: give one")
    if values["strength"] is None and not (masks or pad):
        raise InputError("found init_image without strength, expected how much is redone: give it, such as 0.6")
    own = named or pictures["picture"]
    if len(own) > 1:
        raise InputError(f"found {len(own)} pictures and no init_image, expected one to start from: name it")
    ((_, picture),) = own
    arrays: Arrays = {}
    if pad:
        arrays["init"], arrays["redone"] = padded(picture, size)
    else:
        arrays["init"] = covering(picture, size)
    for name, mask in masks:
        arrays["redone"] = what_is_redone(mask, name, size, (picture.shape[0], picture.shape[1]))
    return arrays, 1.0 if values["strength"] is None else values["strength"]


def _shown(job: JobSettings, values: Mapping[str, Any], size: Size, pictures: Pictures) -> Arrays:
    count = len(job.controlnet)
    if len(pictures) != count:
        raise InputError(
            f"found {len(pictures)} values of control_image for {count} ControlNets of the job, expected one picture "
            "for each: correct them"
        )
    if not count:
        return {}
    numbers: Arrays = {}
    for name in _CONTROLS:
        if len(values[name]) not in (1, count):
            raise InputError(f"found {len(values[name])} values of {name}, expected one, or one for each network")
        numbers[name] = np.broadcast_to(np.asarray(values[name], np.float32), (count,))
    if (numbers["control_start"] >= numbers["control_end"]).any():
        raise InputError(
            f"control_start is {list(values['control_start'])} and control_end {list(values['control_end'])}, expected "
            "start < end: correct them"
        )
    shown = [as_shown(picture, size, job.control_detector) for _, picture in pictures]
    return {"control": np.stack(shown), **numbers}
