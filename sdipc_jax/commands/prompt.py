"""The command `prompt`: pictures in, the prompts themselves out, in a file that other programs read."""

import json

import jax
import numpy as np

from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.checkpoints.tensors import to_safetensors
from sdipc_jax.commands.inputs import expand, read_inputs, vectors_of
from sdipc_jax.commands.outcome import Outcome, notes_of, plain
from sdipc_jax.commands.settings import PromptSettings
from sdipc_jax.files import check_result, write_atomically
from sdipc_jax.prompts.contexts import edit_prompt, image_prompt, negative_prompt
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.plan import plan_conversion
from sdipc_jax.prompts.prompt import AnyPrompt, Prompt
from sdipc_jax.prompts.tokens import read_texts
from sdipc_jax.records import Report


def prompt(settings: PromptSettings, report: Report) -> Outcome:
    """Pictures as prompts, in a safetensors file."""
    config = configure(settings)
    plan_conversion(config, settings)
    check_result(*settings.result, settings.overwrite)
    texts = None if settings.text is None else read_texts(config, [settings.text], **settings.wording)
    paths, notes = expand(settings.pictures)
    inputs, failures = read_inputs(config, paths)
    converter = Converter(config, settings)
    vectors = vectors_of(converter, inputs)
    if texts is None:
        context = image_prompt(converter.bundle, vectors)
    else:
        context = edit_prompt(converter.bundle, vectors, texts.tokens, settings.alpha, texts.weights)
    # Of a vector for each place the first is the end token's.
    each = vectors if vectors.ndim == 2 else vectors[:, 0]
    arrays = embeds(context, negative_prompt(converter.bundle)) | {"image_vectors": np.asarray(each)}
    metadata = {
        "files": json.dumps([each.subject.record["input"] for each in inputs]),
        "settings": json.dumps(plain(settings, {"pictures", "output"}) | converter.values),
        "checkpoint": json.dumps(digests(config, settings.tuned)),
        "format": "pt",
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.output, to_safetensors(arrays, metadata))
    report(1.0)
    records = [each.subject.record for each in inputs]
    return Outcome(records, [settings.output], failures, (*config.notes, *notes, *notes_of(records), *converter.notes))


def embeds(prompt: AnyPrompt, negative: AnyPrompt) -> dict[str, np.ndarray]:
    """Arrays by the names of diffusers' arguments; SDXL's pipeline takes the pooled vectors and all negatives too."""
    if not isinstance(prompt, Prompt):
        return {"prompt_embeds": np.asarray(prompt)}
    negative = jax.tree.map(lambda row, like: np.broadcast_to(row, like.shape).copy(), negative, prompt)
    return {
        f"{sign}{name}prompt_embeds": np.asarray(array)
        for sign, each in (("", prompt), ("negative_", negative))
        for name, array in (("", each.context), ("pooled_", each.pooled))
    }
