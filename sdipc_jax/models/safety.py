"""The safety checker of Stable Diffusion 1.x."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sdipc_jax.models.clip import CLIPVisionModel
from sdipc_jax.models.config import CLIPVisionConfig
from sdipc_jax.models.given import Given
from sdipc_jax.models.layers import DType, dense, precision

_CONCEPTS = 17
_SPECIAL_CARE = 3


def flag(
    special_cosines: Float[Array, "N 3"],
    concept_cosines: Float[Array, "N 17"],
    special_thresholds: Float[Array, " 3"],
    concept_thresholds: Float[Array, " 17"],
) -> Bool[Array, " N"]:
    """Which pictures are flagged.

    A picture near a special-care concept is held to thresholds lower by 0.01. Scores are rounded to three decimals
    before they are compared with 0, as diffusers does.
    """

    def exceeds(cosines: Array, thresholds: Array, lowered: Array | float) -> Bool[Array, "N K"]:
        return jnp.round(cosines - thresholds + lowered, 3) > 0

    # diffusers lowers the thresholds from the first special-care hit on; the concepts come after all of those.
    special = jnp.any(exceeds(special_cosines, special_thresholds, 0.0), axis=-1, keepdims=True)
    return jnp.any(exceeds(concept_cosines, concept_thresholds, jnp.where(special, 0.01, 0.0)), axis=-1)


def cosine(a: Float[Array, "N D"], b: Float[Array, "K D"]) -> Float[Array, "N K"]:
    """All pairs' cosines."""

    def unit(x: Array) -> Array:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return jnp.matmul(unit(a), unit(b).T, precision=precision(jnp.float32))


class StableDiffusionSafetyChecker(Given):
    """Flags pictures whose CLIP embedding is near one of the checkpoint's concepts."""

    config: CLIPVisionConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "N S S 3"]) -> Bool[Array, " N"]:
        """Which pictures, after CLIP preprocessing, are to be withheld."""
        width = self.config.projection_dim

        def table(name: str, *shape: int) -> Array:
            return self.param(name, nn.initializers.normal(1.0), shape, jnp.float32)

        pooled = CLIPVisionModel(self.config, self.dtype, name="vision_model")(pixels)
        embedding = dense(width, self.dtype, use_bias=False, name="visual_projection")(pooled).astype(jnp.float32)
        return flag(
            cosine(embedding, table("special_care_embeds", _SPECIAL_CARE, width)),
            cosine(embedding, table("concept_embeds", _CONCEPTS, width)),
            table("special_care_embeds_weights", _SPECIAL_CARE),
            table("concept_embeds_weights", _CONCEPTS),
        )
