"""The vision tower with trained deep prompts (VPT-deep, Jia et al. 2022; arXiv 2305.12716, section 4.2).

A prompt of layer l is W e_l + b: an embedding of its own under a linear map that all layers share.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from sdipc_jax.models.clip import CLIPVisionTransformer
from sdipc_jax.models.config import CLIPVisionConfig
from sdipc_jax.models.layers import DType, layer_norm, precision


@dataclass(frozen=True)
class DeepPrompts:
    """How many prompts every layer has, and how the first layer takes them.

    Attributes:
        length: prompts a layer.
        overwrite_first_layer: the first layer's replace as many patches, as in the authors' released code; if False
            they are inserted, as the paper draws it.
    """

    length: int
    overwrite_first_layer: bool = False


class CLIPDeepPrompts(nn.Module):
    """The trained parameters: embeddings, the shared linear map, and a norm that starts as the identity."""

    config: CLIPVisionConfig
    length: int
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config, width = self.config, self.config.hidden_size
        shape = (config.num_hidden_layers, self.length, width)
        self.embeddings = self.param("embeddings", self._draw_embeddings, shape, self.dtype)
        self.projection = nn.Dense(
            width,
            dtype=self.dtype,
            param_dtype=self.dtype,
            precision=precision(self.dtype),
            # PyTorch's kaiming_normal_(mode="fan_out").
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        )
        self.layer_norm = layer_norm(config.layer_norm_eps, self.dtype)

    def __call__(self, keep: Float[Array, "*N layers P D"] | None = None) -> Float[Array, "*N layers P D"]:
        """The prompts of every layer.

        Args:
            keep: dropout in training: 0 or 1 / (1 - rate), a factor for every number of every picture's prompts.
        """
        prompts = self.projection(self.embeddings)
        if self.is_initializing():
            # A module that is not called has no parameters.
            self.layer_norm(prompts)
        return prompts if keep is None else prompts * keep.astype(prompts.dtype)

    def norm(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """The norm between the transformer's output and CLIP's own last norm."""
        return self.layer_norm(x)

    def _draw_embeddings(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: DType) -> Float[Array, "layers P D"]:
        bound = math.sqrt(6 / (3 * self.config.patch_size**2 + self.config.hidden_size))
        return jax.random.uniform(key, shape, dtype, -bound, bound)


class PromptedCLIPVisionModel(nn.Module):
    """`CLIPVisionModel` with `deep_prompts` among its parameters."""

    config: CLIPVisionConfig
    prompts: DeepPrompts
    dtype: DType = jnp.float32

    def setup(self) -> None:
        self.vision_model = CLIPVisionTransformer(self.config, self.dtype)
        self.deep_prompts = CLIPDeepPrompts(self.config, self.prompts.length, self.dtype)

    def __call__(
        self, pixels: Float[Array, "N S S 3"], keep: Float[Array, "N layers P D"] | None = None
    ) -> Float[Array, "N D"]:
        """The class token after the last norm.

        Args:
            keep: the prompts' dropout, see `CLIPDeepPrompts`.
        """
        overwrite = self.prompts.overwrite_first_layer
        return self.vision_model(pixels, self.deep_prompts(keep), overwrite, self.deep_prompts.norm)
