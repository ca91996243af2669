"""What a checkpoint's configuration says of a ControlNet beside its UNet."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from sdipc_jax.models import ControlNetConditioningEmbedding, ControlNetConfig, ControlNetModel
from sdipc_jax.models.given import shapes
from sdipc_jax.models.layers import DType


@dataclass(frozen=True)
class ControlSide:
    """A ControlNet beside the UNet: its architecture, and the files that it is read from."""

    network: ControlNetConfig
    files: tuple[str, ...] = field(compare=False)

    def model(self, dtype: DType) -> ControlNetModel:
        """The network."""
        return ControlNetModel(self.network, dtype)

    def embedding(self, dtype: DType) -> ControlNetConditioningEmbedding:
        """What it sees its picture with."""
        return ControlNetConditioningEmbedding(self.network, dtype)

    def abstract_params(self, dtype: DType, context: Any, added: dict[str, Any]) -> dict[str, Any]:
        """The shapes and dtypes of its parameters; `context` and `added` are shapes and dtypes of the UNet's inputs."""
        side, pixels = 2 ** (len(self.network.block_out_channels) - 1), self.network.downscale
        latents = ((1, side, side, self.network.in_channels), jnp.float32)
        hint = ((1, side, side, self.network.block_out_channels[0]), dtype)
        tree = shapes(self.model(dtype), latents, ((1,), jnp.float32), context, hint, **added)
        return tree | {
            "controlnet_cond_embedding": shapes(self.embedding(dtype), ((1, pixels, pixels, 3), jnp.float32))
        }
