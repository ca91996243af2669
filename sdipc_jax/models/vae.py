"""The autoencoder between pictures and latents (diffusers' AutoencoderKL)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdipc_jax.models.attention import Attention
from sdipc_jax.models.config import VAEConfig
from sdipc_jax.models.layers import DType, GroupNorm, conv, silu
from sdipc_jax.models.unet import Downsample2D, ResnetBlock2D, Upsample2D

_EPSILON = 1e-6


def _resnet(config: VAEConfig, channels: int, index: int, dtype: DType) -> ResnetBlock2D:
    return ResnetBlock2D(channels, config.norm_num_groups, _EPSILON, dtype, name=f"resnets_{index}")


class MidBlock(nn.Module):
    """A resnet, single-head attention over all pixels, a resnet at the coarsest level."""

    config: VAEConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h w C"]:
        count, height, width, channels = x.shape
        x = _resnet(self.config, channels, 0, self.dtype)(x)
        attention = Attention(1, self.dtype, True, self.config.norm_num_groups, name="attentions_0")
        x = x + attention(x.reshape(count, height * width, channels)).reshape(x.shape)
        return _resnet(self.config, channels, 1, self.dtype)(x)


class DownEncoderBlock2D(nn.Module):
    """Resnets, then half the size but at the last level."""

    config: VAEConfig
    level: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h2 w2 channels"]:
        channels = self.config.block_out_channels[self.level]
        for index in range(self.config.layers_per_block):
            x = _resnet(self.config, channels, index, self.dtype)(x)
        if self.level < len(self.config.block_out_channels) - 1:
            x = Downsample2D(channels, (0, 1), self.dtype, name="downsamplers_0")(x)
        return x


class UpDecoderBlock2D(nn.Module):
    """Resnets, then twice the size but at the first level."""

    config: VAEConfig
    level: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h2 w2 channels"]:
        channels = self.config.block_out_channels[self.level]
        for index in range(self.config.layers_per_block + 1):
            x = _resnet(self.config, channels, index, self.dtype)(x)
        if self.level > 0:
            x = Upsample2D(channels, self.dtype, name="upsamplers_0")(x, 2 * x.shape[1], 2 * x.shape[2])
        return x


class Encoder(nn.Module):
    """Pictures to features of the latents' size."""

    config: VAEConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N h w C"]:
        config = self.config
        x = conv(config.block_out_channels[0], 3, self.dtype, padding=1, name="conv_in")(x)
        for level in range(len(config.block_out_channels)):
            x = DownEncoderBlock2D(config, level, self.dtype, name=f"down_blocks_{level}")(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        x = silu(GroupNorm(config.norm_num_groups, _EPSILON, self.dtype, name="conv_norm_out")(x))
        return conv(2 * config.latent_channels, 3, self.dtype, padding=1, name="conv_out")(x)


class Decoder(nn.Module):
    """Features of the latents' size to pictures."""

    config: VAEConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N H W 3"]:
        config = self.config
        x = conv(config.block_out_channels[-1], 3, self.dtype, padding=1, name="conv_in")(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        for index, level in enumerate(reversed(range(len(config.block_out_channels)))):
            x = UpDecoderBlock2D(config, level, self.dtype, name=f"up_blocks_{index}")(x)
        x = silu(GroupNorm(config.norm_num_groups, _EPSILON, self.dtype, name="conv_norm_out")(x))
        return conv(config.out_channels, 3, self.dtype, padding=1, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder. Latents here are the network's own: multiply by `scaling_factor` for the UNet."""

    config: VAEConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        channels = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = conv(2 * channels, 1, self.dtype)
        self.post_quant_conv = conv(channels, 1, self.dtype)

    def encode(self, pictures: Float[Array, "N H W 3"]) -> tuple[Float[Array, "N h w C"], Float[Array, "N h w C"]]:
        """The mean and the log of the variance of the latents of pictures in [-1, 1]."""
        moments = self.quant_conv(self.encoder(pictures.astype(self.dtype)))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "N h w C"]) -> Float[Array, "N H W 3"]:
        """Pictures, about in [-1, 1], of latents."""
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype)))

    def __call__(self, pictures: Float[Array, "N H W 3"]) -> Float[Array, "N H W 3"]:
        """Pictures through the mean of their latents and back."""
        return self.decode(self.encode(pictures)[0])
