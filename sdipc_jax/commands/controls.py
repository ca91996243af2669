"""Where, when and in which layers pictures count: options become weights of several prompts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.commands.inputs import read_inputs
from sdipc_jax.commands.job import Prompts, SamplingJob
from sdipc_jax.commands.settings import ControlSettings
from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.guiding import where_it_counts
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.prompts import algebra
from sdipc_jax.prompts.contexts import as_long, image_prompt
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.prompt import AnyPrompt
from sdipc_jax.samplers import SAMPLERS
from sdipc_jax.sampling import weights
from sdipc_jax.settings import Defaults


def when_and_where(
    config: Config, settings: ControlSettings, values: Defaults, first: int
) -> Float[np.ndarray, "1 1 _ evaluations 1 1"] | None:
    """How much pictures count at each evaluation and in each layer, masks aside; None where nothing is asked for.

    Args:
        first: the evaluation that sampling begins with.

    Raises:
        InputError: a layer that does not exist.
    """
    if not settings.mask and (settings.start, settings.end, settings.layers) == (0.0, 1.0, "all"):
        return None
    schedule = SAMPLERS[values.sampler].schedule(config.scheduler, values.steps, first=first)
    found = weights.over_steps(len(schedule.timesteps), settings.start, settings.end)
    return found if settings.layers == "all" else found * weights.over_layers(config.unet, settings.layers.split(","))


class Controls:
    """The options, checked and with masks read, before anything is loaded.

    Args:
        count: of the prompts that masks may tell apart.

    Raises:
        InputError: a layer that does not exist, a mask that cannot be read or is empty, or another number of masks.
    """

    def __init__(self, job: SamplingJob, settings: ControlSettings, count: int) -> None:
        config, values = job.config, job.values
        self.weights = when_and_where(config, settings, values, job.first)
        if len(settings.mask) not in (0, 1, count):
            raise InputError(
                f"found {len(settings.mask)} masks for {count} pictures, expected one, or one for each: correct them"
            )
        size = values.height, values.width
        _, *grid = config.latent_shape(*size)
        self.masks = [
            where_it_counts(read_picture(path).pixels, printable(path), size, (grid[0], grid[1]))
            for path in settings.mask
        ]
        self.negative = read_inputs(config, settings.negative_picture)[0] if settings.negative_picture else []

    def prompts(self, converter: Converter, pictures: AnyPrompt, rest: AnyPrompt) -> Prompts:
        """Each picture's prompt where it counts, and what stands in its place elsewhere."""
        negative = self._negative(converter)
        if self.weights is None:
            return Prompts(pictures, None, negative)
        pictures, rest = as_long(pictures, rest, converter.config.tokens.length)
        both = jax.tree.map(
            lambda one, other: jnp.stack([one, jnp.broadcast_to(other, one.shape)], axis=1), pictures, rest
        )
        places = weights.over_places(np.stack(self.masks)[:, None]) if self.masks else 1.0
        return Prompts(both, weights.and_the_rest(self.weights * places), negative)

    def together(
        self, converter: Converter, pictures: AnyPrompt, rest: AnyPrompt, strengths: Sequence[float]
    ) -> Prompts:
        """One prompt of all pictures, each in the place of its mask."""
        each = as_long(pictures, rest, converter.config.tokens.length)
        context = jax.tree.map(lambda *parts: jnp.concatenate(parts)[None], *each)
        assert self.weights is not None, "there are masks"
        places = weights.over_places(np.stack(self.masks)) * np.reshape(strengths, (1, -1, 1, 1, 1, 1))
        return Prompts(context, weights.and_the_rest(self.weights * places), self._negative(converter))

    def _negative(self, converter: Converter) -> AnyPrompt | None:
        if not self.negative:
            return None
        vectors = converter.vectors([each.pixels for each in self.negative])
        return image_prompt(converter.bundle, converter.at_length(converter.each(algebra.mean, vectors)))
