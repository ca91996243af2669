"""What might be quicker on a card and is not in the package: put in its place while a process lasts.

Each changes the package from outside, before anything is compiled: `benchmark.py --candidate NAME`.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.models import attention
from sdipc_jax.models.layers import Conv, dense, gelu, precision, upsample_nearest
from sdipc_jax.models.unet import UNet2DConditionModel

# The environment's name for a folder of packages that candidates need and nothing else does.
PACKAGES = "CANDIDATES_PACKAGES"


def _package(name: str) -> Any:
    """A package, from that folder if it is there, with what it needs of other versions than the rest does."""
    if folder := os.environ.get(PACKAGES):
        sys.path.insert(0, folder)
    # tokamax reads its own flags there, and refuses others.
    sys.argv = sys.argv[:1]
    return importlib.import_module(name)


class FusedAttention(attention.Attention):
    """One product for queries, keys and values of self-attention."""

    def __call__(self, x: Any, context: Any = None) -> Any:
        """As the package's."""
        if context is not None or self.qkv_bias or self.norm_groups is not None or self.is_initializing():
            return super().__call__(x, context)
        return self._fused(x)

    @nn.compact
    def _fused(self, x: Any) -> Any:
        channels = x.shape[-1]
        kernels = [self.variables["params"][name]["kernel"] for name in ("to_q", "to_k", "to_v")]
        product = jnp.dot(x, jnp.concatenate(kernels, axis=1), precision=precision(self.dtype))
        heads = product.reshape(*x.shape[:-1], 3, self.heads, channels // self.heads)
        attended = attention.dot_product_attention(*jnp.moveaxis(heads, -3, 0))
        return dense(channels, self.dtype, name="to_out_0")(attended.reshape(x.shape))


def fused_projections() -> None:
    attention.Attention = FusedAttention  # type: ignore[misc]


def tokamax_attention() -> None:
    """tokamax's choice of kernel for the card, where scores are many."""
    tokamax = _package("tokamax")

    plain = attention.dot_product_attention

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any = None) -> jax.Array:
        scores = query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]
        if mask is not None or query.dtype == jnp.float32 or scores <= attention._CACHED_SCORES:
            return plain(query, key, value, mask)
        return tokamax.dot_product_attention(query, key, value)

    attention.dot_product_attention = attend


def tokamax_geglu() -> None:
    """The product, the exact GELU and the gate in one kernel."""
    tokamax = _package("tokamax")

    class GEGLU(attention.GEGLU):
        def __call__(self, x: Any) -> Any:
            if self.is_initializing():
                return super().__call__(x)
            proj = self.variables["params"]["proj"]
            # tokamax has no biases: a channel of ones carries them, filled up to what its kernels take.
            value, gate = jnp.split(jnp.concatenate([proj["kernel"], proj["bias"][None]]), 2, axis=1)
            weights = jnp.pad(jnp.stack([gate, value], axis=1), ((0, 31), (0, 0), (0, 0)))
            ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
            x = jnp.concatenate([x, ones, jnp.zeros((*x.shape[:-1], 31), x.dtype)], axis=-1)
            return tokamax.gated_linear_unit(x, weights, activation=gelu, precision=precision(self.dtype))

    attention.GEGLU = GEGLU  # type: ignore[misc]


def quantised(kind: str) -> Callable[[], None]:
    """Weights and activations of the UNet's products and convolutions in 8 bits."""

    def change() -> None:
        qwix = _package("qwix")

        rule = qwix.QtRule(module_path=".*", weight_qtype=kind, act_qtype=kind)

        def unet_model(self: Config) -> Any:
            return qwix.quantize_model(UNet2DConditionModel(self.unet, self.compute_dtype), qwix.QtProvider([rule]))

        def of_doubled(self: Conv, x: jax.Array, height: int, width: int) -> jax.Array:
            return self(upsample_nearest(x, height, width))

        # As on a card everywhere: qwix takes no kernels but those that are parameters.
        Conv.of_doubled = of_doubled  # type: ignore[method-assign]
        Config.unet_model = property(unet_model)  # type: ignore[assignment, method-assign]

    return change


CANDIDATES: dict[str, Callable[[], None]] = {
    "fused-projections": fused_projections,
    "tokamax-attention": tokamax_attention,
    "tokamax-geglu": tokamax_geglu,
    "int8": quantised("int8"),
    "fp8": quantised("float8_e4m3fn"),
}
