"""What a person should know about a checkpoint and the way in which it is to be sampled."""

import re
from collections.abc import Iterator
from pathlib import Path

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.headers import read_metadata
from sdipc_jax.errors import InputError, printable, shortened
from sdipc_jax.samplers.classes import class_of, is_for_few_steps, sampler_of_class
from sdipc_jax.samplers.noise_levels import FILE
from sdipc_jax.settings import Defaults, SamplerSettings

# As models that were distilled to a few steps are called, and where safetensors files say what they are called.
_FEW_STEPS = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper|tcd)(?![a-z])")
_METADATA = ("modelspec.architecture", "modelspec.title", "ss_output_name")
# LCM's LoRAs are used with a little guidance; the others with none.
_MOST_GUIDANCE = {"lcm": 2.0}


def advice(config: Config, settings: SamplerSettings, values: Defaults) -> Iterator[str]:
    """A line each: a scheduler's class that is not built, guidance for a model that was distilled to have none."""
    try:
        sampler_of_class(config.scheduler)
    except InputError as error:
        if class_of(config.scheduler) and settings.sampler is None:
            reason = str(error).removeprefix(f"{FILE}: ").rpartition(": ")[0]
            yield f"the checkpoint's own scheduler is not built ({reason}): {values.sampler} takes its place"
    shown = _few_steps(config, settings)
    if shown and not config.unet.embeds_guidance and values.guidance_scale > _MOST_GUIDANCE.get(values.sampler, 1.0):
        yield (
            f"guidance_scale is {values.guidance_scale:g}, but to judge by {shown} this model was made for few steps "
            "without guidance: try --steps 4 --guidance-scale 0"
        )


def _few_steps(config: Config, settings: SamplerSettings) -> str | None:
    """What shows that a model was distilled to a few steps; None if nothing does."""
    if is_for_few_steps(config.scheduler):
        return f"its {FILE}"
    names = (("the name", Path(each).name) for each in (settings.model, *settings.lora))
    files = (Path(config.folder), *(lora.file for lora in config.loras))
    told = (
        (f"its metadata ({key})", value)
        for file in files
        if file.is_file()
        for key, value in read_metadata(file).items()
        if key in _METADATA
    )
    found = (
        f"{where} {shortened(printable(name))}" for where, name in (*names, *told) if _FEW_STEPS.search(name.lower())
    )
    return next(found, None)
