"""The command `vary`: pictures in, variations of them out."""

from dataclasses import replace

from sdipc_jax.commands.controls import Controls
from sdipc_jax.commands.inputs import each_path, expand, read_inputs, vectors_of
from sdipc_jax.commands.job import SamplingJob
from sdipc_jax.commands.opening import FILES, Opening
from sdipc_jax.commands.outcome import Outcome
from sdipc_jax.commands.settings import VarySettings
from sdipc_jax.prompts.contexts import empty_prompt, image_prompt
from sdipc_jax.prompts.tokens import empty_tokens, groups_of
from sdipc_jax.records import Report


def vary(settings: VarySettings, report: Report, opening: Opening = FILES) -> Outcome:
    """Variations of each picture (eqs. 6 and 7)."""
    job = SamplingJob(settings, opening)
    paths, notes = expand(settings.pictures)
    inputs, failures = read_inputs(job.config, paths)
    job.start_from(each_path(inputs))
    controls = Controls(job, settings, len(inputs))
    job.check([each.subject for each in inputs])
    converter = job.converter()
    context = image_prompt(converter.bundle, vectors_of(converter, inputs))
    prompts = controls.prompts(converter, context, empty_prompt(converter.bundle))
    groups = groups_of(job.config, empty_tokens(job.config)[0], "picture")
    prompts = prompts._replace(groups=[groups] * len(inputs))
    outcome = job.run(converter.bundle, prompts, [each.subject for each in inputs], report, failures, converter)
    return replace(outcome, notes=(*notes, *outcome.notes))
