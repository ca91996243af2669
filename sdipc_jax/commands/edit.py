"""The command `edit`: a picture and a text in, the picture with the text's change out."""

from sdipc_jax.commands.controls import Controls
from sdipc_jax.commands.inputs import each_path, read_inputs, vectors_of
from sdipc_jax.commands.job import SamplingJob
from sdipc_jax.commands.opening import FILES, Opening
from sdipc_jax.commands.outcome import Outcome
from sdipc_jax.commands.settings import EditSettings
from sdipc_jax.prompts.contexts import edit_prompt, text_prompt
from sdipc_jax.prompts.tokens import groups_of
from sdipc_jax.records import Report


def edit(settings: EditSettings, report: Report, opening: Opening = FILES) -> Outcome:
    """The picture with the text's change (eq. 8)."""
    job = SamplingJob(settings, opening)
    texts = job.read([settings.text])
    inputs, failures = read_inputs(job.config, [settings.picture])
    job.start_from(each_path(inputs))
    controls = Controls(job, settings, len(inputs))
    job.check([each.subject for each in inputs])
    converter = job.converter()
    vectors = vectors_of(converter, inputs)
    context = edit_prompt(converter.bundle, vectors, texts.tokens, settings.alpha, texts.weights)
    prompts = controls.prompts(converter, context, text_prompt(converter.bundle, *texts))
    prompts = prompts._replace(groups=[groups_of(job.config, texts.tokens[0], "end and picture")])
    return job.run(converter.bundle, prompts, [each.subject for each in inputs], report, failures, converter)
