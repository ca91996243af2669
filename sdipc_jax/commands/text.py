"""The command `text`: texts in, pictures out."""

from sdipc_jax.checkpoints.bundle import for_sampling
from sdipc_jax.commands.job import Prompts, SamplingJob
from sdipc_jax.commands.opening import FILES, Opening
from sdipc_jax.commands.outcome import Outcome
from sdipc_jax.commands.settings import TextSettings
from sdipc_jax.pictures.outputs import Subject
from sdipc_jax.prompts.contexts import text_prompt
from sdipc_jax.prompts.tokens import groups_of
from sdipc_jax.records import Report


def text(settings: TextSettings, report: Report, opening: Opening = FILES) -> Outcome:
    """Plain text to image."""
    job = SamplingJob(settings, opening)
    texts = job.read(settings.texts)
    subjects = [Subject(prompt, {"text": prompt}) for prompt in settings.texts]
    job.start_from()
    job.check(subjects)
    bundle = opening.weights(job.config, settings.tuned)
    groups = [groups_of(job.config, each) for each in texts.tokens]
    prompts = Prompts(text_prompt(bundle, *texts), negative=job.negative_prompt(bundle), groups=groups)
    bundle = for_sampling(bundle)
    return job.run(bundle, prompts, subjects, report)
