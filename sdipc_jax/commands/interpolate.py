"""The command `interpolate`: two pictures or texts in, the way from one to the other out."""

import io
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdipc_jax.commands.inputs import Input, read_inputs, vectors_of
from sdipc_jax.commands.job import SamplingJob
from sdipc_jax.commands.outcome import Outcome
from sdipc_jax.commands.settings import InterpolateSettings
from sdipc_jax.files import write_atomically
from sdipc_jax.pictures.outputs import Subject
from sdipc_jax.pictures.sheets import contact_sheet, save_png
from sdipc_jax.prompts import algebra
from sdipc_jax.prompts.contexts import image_prompt
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.tokens import token_ids
from sdipc_jax.records import Record, Report

STRIP, ANIMATION = "strip.png", "animation.webp"


def interpolate(settings: InterpolateSettings, report: Report) -> Outcome:
    """The way from one picture or text to another, along the arc between their vectors."""
    job = SamplingJob(settings)
    config = job.config
    ends: list[Input | np.ndarray] = []
    inputs: list[Record] = []
    for name in (settings.first, settings.second):
        if Path(name).is_file():
            ends += read_inputs(config, [Path(name)])[0]
            inputs.append(ends[-1].subject.record)  # type: ignore[union-attr]
        else:
            ends.append(token_ids(config, [name], truncate=settings.truncate))
            inputs.append({"text": name})
    shares = np.linspace(0, 1, settings.frames)
    digits = len(str(settings.frames - 1))
    subjects = [
        Subject(f"frame-{number:0{digits}d}", {"inputs": inputs, "share": float(share)})
        for number, share in enumerate(shares)
    ]
    job.check(subjects)
    converter = Converter(config, settings)

    def vector(end: Input | np.ndarray) -> Float[Array, "1 *places D"]:
        found = vectors_of(converter, [end]) if isinstance(end, Input) else converter.of_texts(end)
        return converter.at_length(found)

    way = converter.each(partial(algebra.slerp, share=shares), vector(ends[0]), vector(ends[1]))
    context = image_prompt(converter.bundle, way)
    return _with_strip(settings, job.run(converter.bundle, context, subjects, report, converter=converter))


def _with_strip(settings: InterpolateSettings, outcome: Outcome) -> Outcome:
    """Adds all frames in a row, and the first way as an animation that goes there and back."""
    if not outcome.records:
        return outcome
    ways = []
    for index in range(settings.num_images):
        names = [record["file"] for record in outcome.records if record["index"] == index]
        ways.append([Image.open(settings.folder / name).convert("RGB") for name in names])
    strip, animation = settings.folder / STRIP, settings.folder / ANIMATION
    save_png(strip, np.asarray(contact_sheet([[np.asarray(frame) for frame in way] for way in ways])), {})
    frames = [*ways[0], *ways[0][-2:0:-1]]
    stream = io.BytesIO()
    pause = round(1000 * settings.frame_seconds)
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], duration=pause, loop=0, lossless=True)
    write_atomically(animation, stream.getvalue())
    return Outcome(outcome.records, [*outcome.files, animation, strip], outcome.failures, outcome.notes)
