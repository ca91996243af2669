"""A copy of the UNet's way down that sees a picture besides (diffusers' ControlNetModel; Zhang et al. 2023)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdipc_jax.errors import InputError
from sdipc_jax.models.config import UNetConfig
from sdipc_jax.models.layers import DType, conv, silu
from sdipc_jax.models.unet import Context, DownBlock, MidBlock, embed_time

# Options of a UNet that a ControlNet does not have.
_OF_UNETS = frozenset(
    """sample_size out_channels center_input_sample up_block_types reverse_transformer_layers_per_block
    time_cond_proj_dim""".split()
)
_ORDERS = ("rgb", "bgr")


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """A ControlNet: the UNet whose way down it has, and how it reads its picture."""

    CLASS_NAME = "ControlNetModel"
    FIXED: ClassVar[Mapping[str, Any]] = {
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "class_embed_type": None,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "conditioning_channels": 3,
        "addition_embed_type_num_heads": 64,
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.controlnet_conditioning_channel_order not in _ORDERS:
            raise InputError(
                f"controlnet_conditioning_channel_order is {self.controlnet_conditioning_channel_order!r}, expected "
                f"{' or '.join(_ORDERS)}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> Self:
        """As others, without what belongs to a UNet alone."""
        for name in _OF_UNETS & values.keys():
            raise InputError(f"{source}: {name} is not an option of {cls.CLASS_NAME}: this is another network's file")
        levels = values.get("down_block_types", cls.down_block_types)
        up = list(_way_up(len(levels))) if isinstance(levels, list | tuple) else []
        return super().from_json({**values, "up_block_types": up}, source)

    @classmethod
    def beside(cls, unet: UNetConfig, **own: Any) -> Self:
        """That of a network whose file says nothing: the UNet's, with what is its own."""
        names = {field.name for field in fields(UNetConfig)} - _OF_UNETS
        shared: dict[str, Any] = {name: getattr(unet, name) for name in names}
        return cls(**shared | {"up_block_types": _way_up(len(unet.down_block_types))} | own)

    def to_json(self) -> dict[str, Any]:
        """The configuration as diffusers writes it."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_UNETS} | dict(self.FIXED)

    @property
    def downscale(self) -> int:
        """Pixels of the picture per latent along one side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


def _way_up(levels: int) -> tuple[str, ...]:
    """Of a UNet's configuration, for what has none."""
    return ("UpBlock2D",) * levels


class ControlNetConditioningEmbedding(nn.Module):
    """The picture on the latents' grid: convolutions, of which every second halves the size."""

    config: ControlNetConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pictures: Float[Array, "N H W 3"]) -> Float[Array, "N h w C_0"]:
        """Takes pictures in [0, 1]. The result depends neither on the step nor on the prompt."""
        widths = self.config.conditioning_embedding_out_channels
        if self.config.controlnet_conditioning_channel_order == "bgr":
            pictures = pictures[..., ::-1]
        x = silu(conv(widths[0], 3, self.dtype, padding=1, name="conv_in")(pictures.astype(self.dtype)))
        for index, (before, after) in enumerate(pairwise(widths)):
            x = silu(conv(before, 3, self.dtype, padding=1, name=f"blocks_{2 * index}")(x))
            x = silu(conv(after, 3, self.dtype, stride=2, padding=1, name=f"blocks_{2 * index + 1}")(x))
        return conv(self.config.block_out_channels[0], 3, self.dtype, padding=1, name="conv_out")(x)


class ControlNetModel(nn.Module):
    """What is added to a UNet's features, each through a convolution that was all zeros before training."""

    config: ControlNetConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "N h w C"],
        timesteps: Float[Array, " N"],
        context: Context,
        hint: Float[Array, "N h w C_0"],
        *,
        text_embeds: Float[Array, "N P"] | None = None,
        time_ids: Float[Array, "N K"] | None = None,
    ) -> tuple[Array, ...]:
        """Runs the network once.

        Args:
            sample, timesteps, context, text_embeds, time_ids: as the UNet takes them.
            hint: the picture, as `ControlNetConditioningEmbedding` gives it.

        Returns:
            The residuals, as `UNet2DConditionModel` takes them.
        """
        config, levels = self.config, len(self.config.block_out_channels)
        time = embed_time(config, self.dtype, timesteps, text_embeds, time_ids)
        context = context.astype(self.dtype)
        x = conv(config.block_out_channels[0], 3, self.dtype, padding=1, name="conv_in")(sample.astype(self.dtype))
        x = x + hint.astype(self.dtype)
        features = [x]
        for level in range(levels):
            x, new = DownBlock(config, level, self.dtype, name=f"down_blocks_{level}")(x, time, context)
            features.extend(new)
        x = MidBlock(config, levels - 1, self.dtype, name="mid_block")(x, time, context)
        names = [*(f"controlnet_down_blocks_{index}" for index in range(len(features))), "controlnet_mid_block"]
        residuals = [
            conv(feature.shape[-1], 1, self.dtype, name=name)(feature)
            for name, feature in zip(names, [*features, x], strict=True)
        ]
        if config.global_pool_conditions:
            means = (jnp.mean(each, axis=(1, 2), keepdims=True, dtype=jnp.float32) for each in residuals)
            residuals = [each.astype(self.dtype) for each in means]
        return tuple(residuals)
