"""The denoiser of Stable Diffusion 1.x, 2.x and SDXL (diffusers' UNet2DConditionModel)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdipc_jax.errors import InputError
from sdipc_jax.models.attention import Transformer2DModel
from sdipc_jax.models.config import UNetConfig
from sdipc_jax.models.layers import DType, GroupNorm, conv, dense, silu, timestep_embedding
from sdipc_jax.models.weighted import MutedTokens, WeightedContexts

# One prompt a picture, or several with weights.
Context = Float[Array, "N L D"] | MutedTokens | WeightedContexts


class ResnetBlock2D(nn.Module):
    """norm, SiLU, convolution, plus the time embedding; norm, SiLU, convolution; plus the input."""

    channels: int
    groups: int
    epsilon: float
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N h w C"], time: Float[Array, "N T"] | None = None
    ) -> Float[Array, "N h w channels"]:
        residual = x
        x = silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x))
        x = conv(self.channels, 3, self.dtype, padding=1, name="conv1")(x)
        if time is not None:
            x = x + dense(self.channels, self.dtype, name="time_emb_proj")(silu(time))[:, None, None]
        x = silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm2")(x))
        x = conv(self.channels, 3, self.dtype, padding=1, name="conv2")(x)
        if residual.shape[-1] != self.channels:
            residual = conv(self.channels, 1, self.dtype, name="conv_shortcut")(residual)
        return residual + x


class Downsample2D(nn.Module):
    """A 3x3 convolution of stride 2: padded by 1 all round in the UNet, after the picture alone in the VAE."""

    channels: int
    padding: tuple[int, int] = (1, 1)
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h2 w2 channels"]:
        return conv(self.channels, 3, self.dtype, stride=2, padding=self.padding, name="conv")(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour doubling, cut to the given size, and a 3x3 convolution."""

    channels: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N h w C"], height: int, width: int) -> Float[Array, "N height width channels"]:
        return conv(self.channels, 3, self.dtype, padding=1, name="conv").of_doubled(x, height, width)


class Block(nn.Module):
    """What the levels of the UNet share: its configuration, and how it makes resnets and transformers."""

    config: UNetConfig
    level: int
    dtype: DType = jnp.float32

    @property
    def channels(self) -> int:
        return self.config.block_out_channels[self.level]

    def resnet(self, index: int) -> ResnetBlock2D:
        config = self.config
        return ResnetBlock2D(
            self.channels, config.norm_num_groups, config.norm_eps, self.dtype, name=f"resnets_{index}"
        )

    def attention(self, index: int, depth: int, only_cross_attention: bool = False) -> Transformer2DModel:
        return Transformer2DModel(
            heads=self.config.attention_head_dim[self.level],
            groups=self.config.norm_num_groups,
            depth=depth,
            use_linear_projection=self.config.use_linear_projection,
            only_cross_attention=only_cross_attention,
            dtype=self.dtype,
            name=f"attentions_{index}",
        )


class DownBlock(Block):
    """Resnets, each followed by a transformer if the level has them, then half the size but at the last level."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "N h w C"], time: Float[Array, "N T"], context: Context
    ) -> tuple[Float[Array, "N h2 w2 channels"], tuple[Array, ...]]:
        config, skips = self.config, []
        for index in range(config.layers_per_block):
            x = self.resnet(index)(x, time)
            if config.down_block_types[self.level] == "CrossAttnDownBlock2D":
                depth = config.depth_down(self.level, index)
                x = self.attention(index, depth, config.only_cross_attention[self.level])(x, context)
            skips.append(x)
        if self.level < len(config.block_out_channels) - 1:
            x = Downsample2D(self.channels, dtype=self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, tuple(skips)


class MidBlock(Block):
    """A resnet, a transformer, a resnet at the coarsest level; the first resnet alone; or nothing."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "N h w C"], time: Float[Array, "N T"], context: Context
    ) -> Float[Array, "N h w C"]:
        if self.config.mid_block_type is None:
            return x
        x = self.resnet(0)(x, time)
        if self.config.mid_block_type == "UNetMidBlock2D":
            return x
        x = self.attention(0, self.config.depth_middle)(x, context)
        return self.resnet(1)(x, time)


class UpBlock(Block):
    """Resnets on the features joined with those the way down left, and twice the size but at the first level."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N h w C"],
        time: Float[Array, "N T"],
        context: Context,
        skips: tuple[Array, ...],
        size: tuple[int, int] | None,
        first: int = 0,
    ) -> Float[Array, "N h2 w2 channels"]:
        """Runs the layers from `first` on, one for each of `skips`, the last of which is the first's."""
        config = self.config
        block_type = config.up_block_types[len(config.block_out_channels) - 1 - self.level]
        for index, skip in enumerate(reversed(skips), start=first):
            x = self.resnet(index)(jnp.concatenate([x, skip], axis=-1), time)
            if block_type == "CrossAttnUpBlock2D":
                depth = config.depth_up(self.level, index)
                x = self.attention(index, depth, config.only_cross_attention[self.level])(x, context)
        if size is not None:
            x = Upsample2D(self.channels, self.dtype, name="upsamplers_0")(x, *size)
        return x


class TimestepEmbedding(nn.Module):
    """Two linear layers on the sinusoids of the timestep, to which a projected condition is added first."""

    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N C"], condition: Float[Array, "N D"] | None = None
    ) -> Float[Array, "N features"]:
        if condition is not None:
            x = x + dense(x.shape[-1], self.dtype, use_bias=False, name="cond_proj")(condition)
        x = silu(dense(self.features, self.dtype, name="linear_1")(x))
        return dense(self.features, self.dtype, name="linear_2")(x)


def embed_time(
    config: UNetConfig,
    dtype: DType,
    timesteps: Float[Array, " N"],
    text_embeds: Float[Array, "N P"] | None = None,
    time_ids: Float[Array, "N K"] | None = None,
    guidance_scale: Float[Array, " N"] | None = None,
) -> Float[Array, "N T"]:
    """What the resnets read beside features, in the module that calls this. See `UNet2DConditionModel`."""
    base = config.block_out_channels[0]
    time = timestep_embedding(timesteps, base, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)
    condition = None
    if config.time_cond_proj_dim is not None:
        guidance = jnp.ones_like(time[:, 0]) if guidance_scale is None else guidance_scale
        # Luo et al. 2023, section 4.1, whose omega is one less than the scale.
        condition = timestep_embedding(
            1000 * (guidance - 1), config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1
        ).astype(dtype)
    time = TimestepEmbedding(4 * base, dtype, name="time_embedding")(time.astype(dtype), condition)
    if config.addition_time_embed_dim is not None:
        if text_embeds is None or time_ids is None:
            raise InputError("this UNet reads a pooled text and sizes too, expected text_embeds and time_ids")
        sinusoids = timestep_embedding(
            time_ids.reshape(-1),
            config.addition_time_embed_dim,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        parts = text_embeds.astype(jnp.float32), sinusoids.reshape(len(time_ids), -1)
        added = jnp.concatenate(parts, axis=-1).astype(dtype)
        time = time + TimestepEmbedding(4 * base, dtype, name="add_embedding")(added)
    return time


class UNet2DConditionModel(nn.Module):
    """Predicts the noise (or v, or the sample, as the checkpoint was trained) of a latent picture under a prompt."""

    config: UNetConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "N h w C"],
        timesteps: Float[Array, " N"],
        context: Context,
        deep: Float[Array, "N h w C_0"] | None = None,
        *,
        with_deep: bool = False,
        residuals: tuple[Array, ...] = (),
        text_embeds: Float[Array, "N P"] | None = None,
        time_ids: Float[Array, "N K"] | None = None,
        guidance_scale: Float[Array, " N"] | None = None,
    ) -> Any:
        """Runs the network once.

        Args:
            sample: the noisy latents, any height and width of at least one pixel at the coarsest level.
            timesteps: the training timestep of each picture, in [0, num_train_timesteps), whole or not.
            context: the prompts' states, (N, L, cross_attention_dim), or several of each picture with weights.
            deep: deep features that another run returned. Only the first convolution and what comes after the deep
                features run then: the last layer on the way up and the last convolution (Ma et al. 2024, DeepCache).
            with_deep: return the deep features too.
            residuals: what ControlNets add to the features that the way down leaves, from the first convolution's on,
                and last to those of the middle; with `deep` the first one alone.
            text_embeds: SDXL's pooled text embedding.
            time_ids: SDXL's sizes in pixels: original height and width, the crop's top and left, target height and
                width.
            guidance_scale: what full LCMs are told instead of being run twice; 1 if left out.

        Returns:
            The prediction, (N, h, w, C_out), or a pair of it and the deep features.
        """
        config = self.config
        base = config.block_out_channels[0]
        time = embed_time(config, self.dtype, timesteps, text_embeds, time_ids, guidance_scale)
        context = context.astype(self.dtype)
        x = sample.astype(self.dtype)
        if config.center_input_sample:
            x = 2 * x - 1

        x = conv(base, 3, self.dtype, padding=1, name="conv_in")(x)
        last = UpBlock(config, 0, self.dtype, name=f"up_blocks_{len(config.block_out_channels) - 1}")
        if deep is None:
            deep = self._deep(x, time, context, last, residuals)
        if residuals:
            x = x + residuals[0]
        x = last(deep, time, context, (x,), None, first=config.layers_per_block)
        x = silu(GroupNorm(config.norm_num_groups, config.norm_eps, self.dtype, name="conv_norm_out")(x))
        x = conv(config.out_channels, 3, self.dtype, padding=1, name="conv_out")(x)
        return (x, deep) if with_deep else x

    def _deep(
        self,
        x: Float[Array, "N h w C_0"],
        time: Float[Array, "N T"],
        context: Context,
        last: UpBlock,
        residuals: tuple[Array, ...],
    ) -> Float[Array, "N h w C_0"]:
        """All the way down, and up to before the last layer of the last block."""
        config = self.config
        levels = len(config.block_out_channels)
        skips: list[Array] = [x]
        for level in range(levels):
            x, new = DownBlock(config, level, self.dtype, name=f"down_blocks_{level}")(x, time, context)
            skips.extend(new)
        x = MidBlock(config, levels - 1, self.dtype, name="mid_block")(x, time, context)
        if residuals:
            x = x + residuals[-1]
            skips = [skip + added for skip, added in zip(skips, residuals[:-1], strict=True)]
        for index, level in enumerate(reversed(range(1, levels))):
            count = config.layers_per_block + 1
            taken, skips = skips[-count:], skips[:-count]
            # Sizes that do not halve evenly come back through the size of the features left by the level above.
            size = skips[-1].shape[1], skips[-1].shape[2]
            x = UpBlock(config, level, self.dtype, name=f"up_blocks_{index}")(x, time, context, tuple(taken), size)
        return last(x, time, context, tuple(skips[1:]), None)
