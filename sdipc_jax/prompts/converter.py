"""A checkpoint with its closed form, as settings ask for it: what takes a command's pictures to vectors."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.load import load_weights
from sdipc_jax.checkpoints.tensors import load_tree
from sdipc_jax.prompts.projection import closed_form, convert, default_scale, truncated_pinv
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.settings import ProjectionSettings


class Converter:
    """The checkpoint and its closed form, with what the checkpoint decided.

    Attributes:
        values: the cut-off and the scale that are used.
        notes: says so where the scale had to be measured.
    """

    def __init__(self, config: Config, settings: ProjectionSettings) -> None:
        cutoff = config.defaults.cutoff if settings.cutoff is None else settings.cutoff
        _check_projection(config, 0.0 if settings.keep_fraction else cutoff)
        self.config = config
        self.bundle = load_weights(config, settings.tuned)
        self.projection = closed_form(
            self.bundle, cutoff, settings.scale, settings.mode, keep_fraction=settings.keep_fraction
        )
        scale = float(self.projection.scale)
        self.values = {"cutoff": None if settings.keep_fraction else cutoff, "scale": scale}
        self.notes: tuple[str, ...] = ()
        if settings.scale is None and default_scale(config) is None:
            self.notes = (f"scale {scale:.4g}, measured over built-in captions",)

    def vectors(self, pictures: Sequence[Float32[np.ndarray, "S S 3"]]) -> Float[Array, "N D_text"]:
        """Eq. 6 for preprocessed pictures."""
        # One at a time: the same picture gives the same vector to the bit, whatever stands beside it.
        features = [encode_images(self.bundle, pixels[None]) for pixels in pictures]
        return convert(self.projection, jnp.concatenate(features))


def _check_projection(config: Config, cutoff: float) -> None:
    """Refuses a cut-off that leaves nothing, before gigabytes are loaded and anything is compiled."""
    shape = jax.ShapeDtypeStruct((config.text.hidden_size, config.vision_side.projection_dim), jnp.float32)
    others = ("text_model.", "vision_model.", "visual_projection.", "logit_scale")
    folder = Path(config.vision_side.folder)
    tree = load_tree(folder, "clip", {"text_projection": {"kernel": shape}}, unused_prefixes=others)
    truncated_pinv(np.asarray(tree["text_projection"]["kernel"]), cutoff)
