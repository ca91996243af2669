"""The networks that teach the vision tower that ships: residual ones, of the UNet's own blocks.

A few thousand drawings teach convolutions far more than a vision transformer, which has to find out that what is near
belongs together. CLIP's vision tower is a transformer, so the text tower is trained beside such a network, and the
transformer then learns to give what several of them give on the mean (Touvron et al. 2021): together they find more
than each does, since each errs in its own way.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdipc_jax.models.layers import DType, GroupNorm, conv, silu
from sdipc_jax.models.unet import Downsample2D, ResnetBlock2D

_EPSILON = 1e-5


class ConvolutionalTower(nn.Module):
    """Two residual blocks for each number of channels, at half the size of those before; their mean, projected."""

    channels: tuple[int, ...]
    features: int
    groups: int = 16
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pictures: Float[Array, "N S S 3"]) -> Float[Array, "N D"]:
        x = conv(self.channels[0], 3, self.dtype, stride=2, padding=1, name="conv_in")(2 * pictures - 1)
        for index, channels in enumerate(self.channels):
            if index:
                x = Downsample2D(channels, dtype=self.dtype, name=f"down_blocks_{index}")(x)
            for layer in range(2):
                block = ResnetBlock2D(channels, self.groups, _EPSILON, self.dtype, name=f"blocks_{index}_{layer}")
                x = block(x)
        x = silu(GroupNorm(self.groups, _EPSILON, self.dtype, name="norm_out")(x))
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.features, use_bias=False, kernel_init=nn.initializers.orthogonal(), name="projection")(x)
