"""Convolutions, dense layers and norms as PyTorch computes them. Pictures are NHWC throughout the models."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdipc_jax.models import winograd
from sdipc_jax.models.given import Dense, Given, LayerNorm
from sdipc_jax.tracing import platform

DType = Any


def precision(dtype: DType) -> jax.lax.Precision | None:
    """float32 means float32: without this, TPUs multiply in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dense(features: int, dtype: DType, *, use_bias: bool = True, name: str | None = None) -> Dense:
    """A linear layer whose weights and arithmetic have `dtype`."""
    return Dense(features, use_bias=use_bias, dtype=dtype, param_dtype=dtype, precision=precision(dtype), name=name)


class Conv(Given, nn.Conv):
    """A convolution that takes Winograd's form wherever `winograd.transformed` has left it a kernel for it."""

    def __call__(self, inputs: Float[Array, "N h w C"]) -> Float[Array, "N h2 w2 features"]:
        """As Flax's."""
        if self.has_variable(winograd.COLLECTION, "kernel"):
            kernel: Array = self.get_variable(winograd.COLLECTION, "kernel")
            bias: Array = self.get_variable("params", "bias")
            return winograd.convolve(inputs, kernel) + bias
        asked = self.is_mutable_collection(winograd.COLLECTION) and not self.is_initializing()
        if asked and self.strides == (1, 1) and self.padding == ((1, 1), (1, 1)):
            transformed = winograd.transform_kernel(self.get_variable("params", "kernel"), *inputs.shape[1:3])
            if transformed is not None:
                self.put_variable(winograd.COLLECTION, "kernel", transformed)
        return super().__call__(inputs)

    def of_doubled(
        self, x: Float[Array, "N h w C"], height: int, width: int
    ) -> Float[Array, "N height width features"]:
        """The convolution of `upsample_nearest`, on CPUs with 2.25 times fewer multiplications where it can be.

        Of the three pixels along a side that a kernel reads two are the same small pixel. So it is as if the small
        picture was convolved by four kernels of 2x2, one for each pixel of a pair of pairs.
        """
        small = (height, width) == (2 * x.shape[1], 2 * x.shape[2]) and platform() == "cpu"
        if not small or self.is_initializing() or self.has_variable(winograd.COLLECTION, "kernel"):
            return self(upsample_nearest(x, height, width))
        kernel: Array = self.get_variable("params", "kernel")
        # Kernels that have Winograd's form for large pictures are left as they are for small ones.
        if self.dtype != jnp.float32 or kernel.dtype != jnp.float32 or winograd.gains(kernel):
            return self(upsample_nearest(x, height, width))
        return _convolve_doubled(x.astype(jnp.float32), kernel) + self.get_variable("params", "bias")


def _convolve_doubled(x: Float[Array, "N h w C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "N h2 w2 D"]:
    """A 3x3 convolution, padded by 1, of a picture twice as large."""
    count, height, width, channels = x.shape
    rows = _of_pairs([kernel[0], kernel[1], kernel[2]])
    kernels = [[_of_pairs([row[0], row[1], row[2]]) for row in pair] for pair in rows]
    # Of the small pixels (i, j), for the pixels (a, b) of a pair of pairs.
    joined = [
        jnp.concatenate([kernels[a][i][b][j] for a in range(2) for b in range(2)], axis=1)
        for i in range(2)
        for j in range(2)
    ]
    result = jax.lax.conv_general_dilated(
        x,
        jnp.stack(joined).reshape(2, 2, channels, -1),
        (1, 1),
        ((1, 1), (1, 1)),
        None,
        None,
        ("NHWC", "HWIO", "NHWC"),
        precision=precision(jnp.float32),
    ).reshape(count, height + 1, width + 1, 2, 2, -1)
    # The second of a pair reads from its own small pixel on, the first from the one before.
    lines = [[result[:, a : a + height, b : b + width, a, b] for b in range(2)] for a in range(2)]
    pixels = jnp.stack([jnp.stack(line, axis=3) for line in lines], axis=2)
    return pixels.reshape(count, 2 * height, 2 * width, -1)


def _of_pairs(weights: list[Array]) -> list[list[Array]]:
    """What falls on two small pixels of three weights in a row, for the first and the second of a pair of pixels."""
    first, second, third = weights
    return [[first, second + third], [first + second, third]]


def conv(
    features: int,
    kernel_size: int,
    dtype: DType,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    use_bias: bool = True,
    name: str | None = None,
) -> Conv:
    """A square convolution. `padding` is (before, after) along both axes, or one number for both."""
    pad = (padding, padding) if isinstance(padding, int) else padding
    return Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=(pad, pad),
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=dtype,
        precision=precision(dtype),
        name=name,
    )


def layer_norm(epsilon: float, dtype: DType, *, name: str | None = None) -> LayerNorm:
    """Statistics in float32, in two passes: E[x^2] - E[x]^2 cancels where the mean is large."""
    return LayerNorm(epsilon=epsilon, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name)


class GroupNorm(Given):
    """Group normalisation over space and the channels of a group, in float32.

    Space is reduced first, channel by channel, and the few numbers left are then pooled by group: on CPUs this is
    several times faster than reducing a (height, width, channels of a group) block at once.
    """

    groups: int
    epsilon: float
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N *space channels"]) -> Float[Array, "N *space channels"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.dtype)
        space = tuple(range(1, x.ndim - 1))
        centred = x.astype(jnp.float32)
        centred = centred - self._group_mean(jnp.mean(centred, axis=space, keepdims=True))
        variance = self._group_mean(jnp.mean(jnp.square(centred), axis=space, keepdims=True))
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale.astype(jnp.float32)
        return (centred * factor + bias.astype(jnp.float32)).astype(self.dtype)

    def _group_mean(self, per_channel: Float[Array, "N *one channels"]) -> Float[Array, "N *one channels"]:
        shape = per_channel.shape
        grouped = per_channel.reshape(*shape[:-1], self.groups, shape[-1] // self.groups)
        mean = jnp.mean(grouped, axis=-1, keepdims=True)
        return jnp.broadcast_to(mean, grouped.shape).reshape(shape)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x). Like the other activations it rounds once, at its end, as PyTorch's do in bfloat16."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The sigmoid approximation of OpenAI's CLIP models: x sigmoid(1.702 x)."""
    exact = x.astype(jnp.float32)
    return (exact * jax.nn.sigmoid(1.702 * exact)).astype(x.dtype)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU, by the error function as PyTorch has it: jax.nn.gelu's, by 1 - erf, is several times the work."""
    exact = x.astype(jnp.float32)
    return (0.5 * exact * (1 + jax.lax.erf(exact * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def timestep_embedding(
    timesteps: Float[Array, " N"], features: int, *, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "N features"]:
    """Sinusoids of geometrically spaced frequencies, in float32 (Vaswani et al. 2017, section 3.5; Ho et al. 2020)."""
    half = features // 2
    exponent = -jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    embedding = jnp.concatenate([cosine, sine] if flip_sin_to_cos else [sine, cosine], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, features % 2)))


def upsample_nearest(x: Float[Array, "N h w C"], height: int, width: int) -> Float[Array, "N height width C"]:
    """Doubles both sides and cuts to the given size, which is what nearest-neighbour sampling to it gives."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]
