"""Attention: one entry for every network, and the transformer block of the UNet."""

import warnings
from functools import cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sdipc_jax.batches import in_equal_parts
from sdipc_jax.models.layers import DType, GroupNorm, conv, dense, gelu, layer_norm, precision
from sdipc_jax.models.weighted import LayerContexts, MutedTokens, WeightedContexts
from sdipc_jax.tracing import platform, varying_axes

# Where cross-attention's weights go for whoever asks for them, by making this collection mutable.
WATCHED = "attention"
# Above this many scores (32 MB) they leave a CPU's cache, and a pass over queries in blocks of this many wins; with
# few keys, as of a prompt, it wins nothing.
_CACHED_SCORES = 2**23
_QUERIES = 512
# Above this many (4 GB) scores are too much for the memory of accelerators.
_MOST_SCORES = 2**30
# The deepest heads that cuDNN's kernel takes on every card that it runs on; on Hopper it takes 256.
FUSED_DEPTH = 128
# Numbers side by side in a TPU's registers.
_LANES = 128
# Numbers that a CPU's matrix product takes at once along a side, or a multiple of them. Parts of a prompt's 77 keys win
# nothing.
_ALIGNED = 64


def dot_product_attention(
    query: Float[Array, "N Q heads depth"],
    key: Float[Array, "N K heads depth"],
    value: Float[Array, "N K heads depth"],
    mask: Bool[Array, "Q K"] | None = None,
) -> Float[Array, "N Q heads depth"]:
    """softmax(Q K^T / sqrt(depth)) V with scores and softmax in float32 (Vaswani et al. 2017, eq. 1).

    Where scores would be many, a form that does not keep them: block by block on CPUs, in half precision a fused kernel
    on GPUs (cuDNN's) and TPUs (JAX's flash attention), blocks of queries elsewhere.

    Args:
        mask: True where a query may look at a key; all of them if None.
    """
    count, queries, heads, depth = query.shape
    keys = key.shape[1]
    scores = count * heads * queries * keys
    if mask is not None or scores <= _CACHED_SCORES:
        return _attend_at_once(query, key, value, mask)
    if platform() == "gpu" and depth % 8 == 0 and depth <= FUSED_DEPTH and queries % 2 == keys % 2 == 0:
        # Not one more branch below: a branch is traced everywhere, and without cuDNN that is an error.
        if query.dtype in (jnp.bfloat16, jnp.float16):
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        _warn_of_missing_kernel(query.dtype)
    if keys < _QUERIES // 4:
        return _attend_at_once(query, key, value)
    branches = {"cpu": attend_in_blocks}
    if query.dtype == jnp.bfloat16 and _flash_takes(query, key):
        branches["tpu"] = attend_on_tpu
    elsewhere = _attend_at_once if scores <= _MOST_SCORES else attend_by_queries
    return jax.lax.platform_dependent(query, key, value, **branches, default=elsewhere)


def attention_weights(
    query: Float[Array, "N Q heads depth"], key: Float[Array, "N K heads depth"]
) -> Float[Array, "N Q K"]:
    """How much each query looks at each key, float32, the mean over heads."""
    exact = precision(query.dtype)
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key, precision=exact, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).mean(axis=1)


@cache
def _warn_of_missing_kernel(dtype: Any) -> None:
    """Once."""
    warnings.warn(
        f"cuDNN's attention takes bfloat16 and float16, this model is in {dtype}: its attention runs in plain "
        "operations, slower and in more memory",
        stacklevel=4,
    )


def _flash_takes(query: Float[Array, "N Q heads depth"], key: Float[Array, "N K heads depth"]) -> bool:
    """Whether JAX's flash attention has been written for these shapes, and may stand here.

    XLA does not divide it over devices: there has to be one, or a `shard_map` over all axes of the mesh. And it says
    nothing of the axes that its result differs over, so that `shard_map` must not check them.
    """
    depth, mesh = query.shape[3], jax.sharding.get_abstract_mesh()
    manual = jax.device_count() == 1 if mesh.empty else set(mesh.axis_types) == {jax.sharding.AxisType.Manual}
    whole = query.shape[1] % _LANES == key.shape[1] % _LANES == 0
    return manual and not varying_axes(query) and whole and (depth <= _LANES or depth % _LANES == 0)


def attend_on_tpu(
    query: Float[Array, "N Q heads depth"],
    key: Float[Array, "N K heads depth"],
    value: Float[Array, "N K heads depth"],
) -> Float[Array, "N Q heads depth"]:
    """`dot_product_attention` by the flash attention that JAX ships for TPUs, in tiles of at most 512 by 512 tokens.

    Args:
        query: Q and K multiples of 128, depth at most 128 or a multiple of it.
    """
    # Loads Pallas, which nothing else needs.
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    rows, columns = (next(size for size in (512, 256, _LANES) if x.shape[1] % size == 0) for x in (query, key))
    tiles = BlockSizes(
        block_b=1,
        block_q=rows,
        block_k_major=columns,
        block_k=columns,
        block_q_major_dkv=rows,
        block_q_dkv=rows,
        block_k_major_dkv=columns,
        block_k_dkv=columns,
        block_q_dq=rows,
        block_k_major_dq=columns,
        block_k_dq=columns,
    )
    by_head = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    attended = flash_attention(*by_head, sm_scale=query.shape[3] ** -0.5, block_sizes=tiles)
    return jnp.swapaxes(attended, 1, 2)


def _attend(
    query: Float[Array, "*N Q depth"],
    key: Float[Array, "*N depth K"],
    value: Float[Array, "*N K depth"],
    mask: Bool[Array, "Q K"] | None = None,
) -> Float[Array, "*N Q depth"]:
    """`dot_product_attention` of single heads; keys lie as the first product reads them."""
    queries, keys, values = [query], [key], [value]
    if mask is None and key.shape[-1] > 2 * _ALIGNED and query.dtype == jnp.float32 and platform() == "cpu":
        queries, keys, values = _aligned(query, -2), _aligned(key, -1), _aligned(value, -2)
    return jnp.concatenate([_attend_to_parts(rows, keys, values, mask) for rows in queries], axis=-2)


def _aligned(x: Float[Array, "*shape"], axis: int) -> list[Float[Array, "*part"]]:
    """The tokens up to the last multiple of 64, and the others: a CPU multiplies 257 far slower than 256 and 1."""
    whole = x.shape[axis] // _ALIGNED * _ALIGNED
    return [part for part in jnp.split(x, [whole], axis) if part.shape[axis]]


def _attend_to_parts(
    query: Float[Array, "*N Q depth"],
    keys: list[Float[Array, "*N depth K"]],
    values: list[Float[Array, "*N K depth"]],
    mask: Bool[Array, "Q K"] | None,
) -> Float[Array, "*N Q depth"]:
    """`_attend` with keys and values in parts, of which a mask takes one."""
    dtype = query.dtype
    scores = [jnp.matmul(query, key, precision=precision(dtype), preferred_element_type=jnp.float32) for key in keys]
    if mask is not None:
        scores = [jnp.where(mask, scores[0], -jnp.inf)]
    largest = reduce(jnp.maximum, (part.max(axis=-1, keepdims=True) for part in scores))
    largest = jax.lax.stop_gradient(largest)
    weights = [jnp.exp((part - largest) * query.shape[-1] ** -0.5) for part in scores]
    sums = reduce(jnp.add, (part.sum(axis=-1, keepdims=True) for part in weights))

    def averaged(weights: list[Float[Array, "*N Q K"]]) -> Float[Array, "*N Q depth"]:
        products = (jnp.matmul(*each, precision=precision(dtype)) for each in zip(weights, values, strict=True))
        return reduce(jnp.add, products)

    if dtype != jnp.float32:
        # Or else a gradient would keep the second product in float32.
        return averaged([(part / sums).astype(dtype) for part in weights])
    # The softmax's division after the second product, where it has fewer numbers to divide.
    return averaged(weights) / sums


def _attend_at_once(
    query: Float[Array, "N Q heads depth"],
    key: Float[Array, "N K heads depth"],
    value: Float[Array, "N K heads depth"],
    mask: Bool[Array, "Q K"] | None = None,
) -> Float[Array, "N Q heads depth"]:
    keys = key.transpose(0, 2, 3, 1)
    return jnp.swapaxes(_attend(jnp.swapaxes(query, 1, 2), keys, jnp.swapaxes(value, 1, 2), mask), 1, 2)


def _laid_out_once(x: Float[Array, "*shape"], order: tuple[int, ...]) -> Float[Array, "*shape"]:
    """The same, in whose memory the axes come in this order, on CPUs.

    XLA takes products of what does not change out of a loop, but what only moves numbers no further than with something
    after it that it deems worth keeping. The barrier is such a thing, and gone when the program is made.
    """
    if platform() != "cpu":
        return x
    return jax.lax.optimization_barrier(x.transpose(order)).transpose(np.argsort(order))


def attend_by_queries(
    query: Float[Array, "N Q heads depth"],
    key: Float[Array, "N K heads depth"],
    value: Float[Array, "N K heads depth"],
) -> Float[Array, "N Q heads depth"]:
    """`dot_product_attention` of 512 queries at a time, of all heads at once; gradients compute the scores again."""
    count, queries, heads, depth = query.shape
    by_block = jnp.moveaxis(in_equal_parts(query, _QUERIES, axis=1), 1, 0)
    attended = jax.lax.map(jax.checkpoint(lambda block: _attend_at_once(block, key, value)), by_block)
    return jnp.moveaxis(attended, 0, 1).reshape(count, -1, heads, depth)[:, :queries]


def attend_in_blocks(
    query: Float[Array, "N Q heads depth"],
    key: Float[Array, "N K heads depth"],
    value: Float[Array, "N K heads depth"],
) -> Float[Array, "N Q heads depth"]:
    """`dot_product_attention` of few queries at a time, so that scores stay in the cache.

    One picture at a time, or if that has more than 512 queries one head of it and at most 512 of them. Gradients
    compute the scores again (Rabe and Staats 2021) instead of keeping them.
    """
    count, queries, heads, depth = query.shape
    if queries <= _QUERIES:

        def picture(inputs: tuple[Array, Array, Array]) -> Float[Array, "Q heads depth"]:
            return _attend_at_once(*(x[None] for x in inputs))[0]

        return jax.lax.map(jax.checkpoint(picture), (query, key, value))
    by_head = in_equal_parts(query, _QUERIES, axis=1).transpose(0, 3, 1, 2, 4)
    blocks, size = by_head.shape[2:4]

    def head(inputs: tuple[Array, Array, Array]) -> Float[Array, "blocks size depth"]:
        return jax.lax.map(jax.checkpoint(lambda block: _attend(block, *inputs[1:])), inputs[0])

    flat = by_head.reshape(count * heads, blocks, size, depth)
    keys = key.transpose(0, 2, 3, 1).reshape(count * heads, depth, -1)
    values = value.transpose(0, 2, 1, 3).reshape(count * heads, -1, depth)
    attended = jax.lax.map(head, (flat, keys, values))
    return attended.reshape(count, heads, blocks * size, depth)[:, :, :queries].transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Multi-head attention of diffusers: `to_q`, `to_k`, `to_v`, `to_out.0`.

    `upcast_attention` needs no switch here, since scores are float32 whatever the dtype. The VAE's attention has
    biases everywhere and normalises its input itself (`group_norm`).
    """

    heads: int
    dtype: DType = jnp.float32
    qkv_bias: bool = False
    norm_groups: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N Q channels"],
        context: Float[Array, "N K width"] | MutedTokens | LayerContexts | None = None,
    ) -> Float[Array, "N Q channels"]:
        channels = x.shape[-1]
        watched = context is not None and self.is_mutable_collection(WATCHED) and not self.is_initializing()
        if self.norm_groups is not None:
            x = GroupNorm(self.norm_groups, 1e-6, self.dtype, name="group_norm")(x)
        context = x if context is None else context

        def heads_of(states: Float[Array, "N K width"], name: str) -> Float[Array, "N K heads depth"]:
            projected = dense(channels, self.dtype, use_bias=self.qkv_bias, name=name)(states)
            return projected.reshape(*states.shape[:-1], self.heads, channels // self.heads)

        def attend(query: Float[Array, "N Q heads depth"], context: Any) -> Array:
            states, values, kept = context, context, None
            if isinstance(context, MutedTokens):
                states, values, kept = context.states, context.values, context.kept
            key, value = heads_of(states, "to_k"), heads_of(values, "to_v")
            if states is not x:
                # A prompt's are the same in every step.
                key, value = _laid_out_once(key, (0, 2, 3, 1)), _laid_out_once(value, (0, 2, 1, 3))
            if watched:
                weights = attention_weights(query, key)
                self.sow(WATCHED, "weights", weights if kept is None else weights * kept[:, None])
            return dot_product_attention(query, key, value)

        query = heads_of(x, "to_q")
        attended = context.attend(query, attend) if isinstance(context, LayerContexts) else attend(query, context)
        return dense(channels, self.dtype, name="to_out_0")(attended.reshape(x.shape))


class GEGLU(nn.Module):
    """x W_x * gelu(x W_g) with the exact GELU (Shazeer 2020, eq. 6)."""

    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N K channels"]) -> Float[Array, "N K features"]:
        value, gate = jnp.split(dense(2 * self.features, self.dtype, name="proj")(x), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N K channels"]) -> Float[Array, "N K channels"]:
        channels = x.shape[-1]
        hidden = GEGLU(4 * channels, self.dtype, name="net_0")(x)
        return dense(channels, self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each after a norm and added to its input."""

    heads: int
    only_cross_attention: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N K channels"], context: Float[Array, "N L D"] | MutedTokens | LayerContexts
    ) -> Float[Array, "N K channels"]:
        normed = layer_norm(1e-5, self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="attn1")(normed, context if self.only_cross_attention else None)
        normed = layer_norm(1e-5, self.dtype, name="norm2")(x)
        x = x + Attention(self.heads, self.dtype, name="attn2")(normed, context)
        normed = layer_norm(1e-5, self.dtype, name="norm3")(x)
        return x + FeedForward(self.dtype, name="ff")(normed)


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map. Its norm has epsilon 1e-6, unlike the resnets' 1e-5."""

    heads: int
    groups: int
    depth: int = 1
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N h w channels"], context: Float[Array, "N L D"] | MutedTokens | WeightedContexts
    ) -> Float[Array, "N h w channels"]:
        count, height, width, channels = x.shape
        own = context.at(self.path, height, width) if isinstance(context, WeightedContexts) else context
        residual = x
        x = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)

        # A 1x1 convolution and a linear layer are one operation; only the shape of the stored kernel differs.
        def projection(name: str) -> nn.Dense | nn.Conv:
            if self.use_linear_projection:
                return dense(channels, self.dtype, name=name)
            return conv(channels, 1, self.dtype, name=name)

        x = projection("proj_in")(x).reshape(count, height * width, channels)
        for index in range(self.depth):
            name = f"transformer_blocks_{index}"
            x = BasicTransformerBlock(self.heads, self.only_cross_attention, self.dtype, name=name)(x, own)
        return projection("proj_out")(x.reshape(count, height, width, channels)) + residual
