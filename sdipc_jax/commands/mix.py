"""The command `mix`: pictures in, pictures of all of them out."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sdipc_jax.commands.controls import Controls
from sdipc_jax.commands.inputs import read_inputs, vectors_of
from sdipc_jax.commands.job import SamplingJob
from sdipc_jax.commands.opening import FILES, Opening
from sdipc_jax.commands.outcome import Outcome
from sdipc_jax.commands.settings import MixSettings
from sdipc_jax.errors import InputError
from sdipc_jax.pictures.outputs import Subject
from sdipc_jax.pictures.sheets import contact_sheet
from sdipc_jax.prompts import algebra
from sdipc_jax.prompts.contexts import edit_prompt, image_prompt, text_prompt
from sdipc_jax.prompts.tokens import token_ids
from sdipc_jax.records import Report

_STEMS_IN_NAME = 4


def mix(settings: MixSettings, report: Report, opening: Opening = FILES) -> Outcome:
    """Several pictures as one prompt."""
    job = SamplingJob(settings, opening)
    config = job.config
    texts = job.read([settings.text or ""])
    inputs, failures = read_inputs(config, settings.pictures)
    if failures:
        # A mean of the others is not what was asked for.
        raise InputError(failures[0]["error"])
    files = [name for name in settings.without if Path(name).is_file()]
    words = [name for name in settings.without if name not in files]
    unwanted = read_inputs(config, [Path(name) for name in files])[0] if files else []
    unwanted_tokens = token_ids(config, words, truncate=settings.truncate)
    job.start_from()
    controls = Controls(job, settings, len(inputs))
    weights = list(settings.weights) or [1.0] * len(inputs)
    if not settings.mask:
        algebra.check_weights(len(inputs), weights)

    stems = [each.subject.name for each in inputs]
    subject = Subject(
        "+".join(stems[:_STEMS_IN_NAME]) + ("+more" if len(stems) > _STEMS_IN_NAME else ""),
        {"inputs": [each.subject.record for each in inputs], "weights": weights},
        np.asarray(contact_sheet([[each.subject.picture for each in inputs if each.subject.picture is not None]])),
    )
    job.check([subject])
    converter = job.converter()
    vectors = vectors_of(converter, inputs)
    rest = text_prompt(converter.bundle, *texts)
    if settings.mask:
        prompts = controls.together(converter, image_prompt(converter.bundle, vectors), rest, weights)
        return job.run(converter.bundle, prompts, [subject], report, failures, converter)
    vector = converter.each(partial(algebra.mean, weights=weights), vectors)
    if settings.without:
        # As directions from the middle of all texts: what these share is no part of what a word means.
        middle = converter.of_all_texts()
        parts = [converter.vectors([each.pixels for each in unwanted])] if unwanted else []
        parts += [converter.of_texts(unwanted_tokens)] if words else []
        directions = jnp.concatenate(parts) - middle
        vector = middle + converter.each(algebra.project_out, vector - middle, directions)
    if settings.mean == "direction":
        vector = converter.at_length(vector)
    if settings.text:
        context = edit_prompt(converter.bundle, vector, texts.tokens, settings.alpha, texts.weights)
    else:
        context = image_prompt(converter.bundle, vector)
    return job.run(converter.bundle, controls.prompts(converter, context, rest), [subject], report, failures, converter)
