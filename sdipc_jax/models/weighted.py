"""Several prompts at once: each layer of cross-attention adds their outputs, with weights of this layer and place.

For a pixel's query q and contexts r = 1 to R with keys K_r and values V_r a layer gives

    sum over r of w_r softmax(q K_r^T / sqrt(d)) V_r

before its output projection, where w_r is the weight of context r in this layer and at this pixel. This is
IP-Adapter's decoupled cross-attention (Ye et al. 2023, arXiv 2308.06721, eq. 5) for any number of prompts of one kind.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdipc_jax.models.config import UNetConfig

Path = tuple[str, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["states", "kept"], meta_fields=[])
@dataclass(frozen=True)
class MutedTokens:
    """What takes the place of a prompt's states where some tokens' attention is to count less or not at all.

    Weights are multiplied after the softmax and not made to add up to 1 again (arXiv 2305.12716, Fig. 2). A token's
    weight times its value is what it adds, so that its value is multiplied instead.

    Attributes:
        states: (N, L, D), or (N, R, L, D).
        kept: how much of each token's attention counts, (N, L), or (N, R, L).
    """

    states: Float[Array, "N *R L D"]
    kept: Float[Array, "N *R L"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the states."""
        return self.states.shape

    def astype(self, dtype: Any) -> "MutedTokens":
        """With states of this dtype."""
        return replace(self, states=self.states.astype(dtype))

    @property
    def values(self) -> Float[Array, "N *R L D"]:
        """What values are computed from; keys are from the states."""
        return self.states * self.kept[..., None].astype(self.states.dtype)


States = Float[Array, "N *R L D"] | MutedTokens


@partial(jax.tree_util.register_dataclass, data_fields=["states", "weights"], meta_fields=["layers"])
@dataclass(frozen=True)
class WeightedContexts:
    """What a UNet takes in the place of one context.

    Attributes:
        states: R prompts for each picture, (N, R, L, D).
        weights: of each prompt in each layer at each place, (N, R, layers, h, w); every axis but the first two may have
            length 1. Masks of any size are resized to each layer's grid.
        layers: the paths of the transformers that the third axis stands for.
    """

    states: States
    weights: Float[Array, "N R _ _ _"]
    layers: tuple[Path, ...]

    def astype(self, dtype: Any) -> "WeightedContexts":
        """With states of this dtype."""
        return replace(self, states=self.states.astype(dtype))

    def at(self, path: Path, height: int, width: int) -> "LayerContexts":
        """The part of one layer, whose feature map has this size."""
        layer = self.layers.index(path) if self.weights.shape[2] > 1 else 0
        weights = self.weights[:, :, layer]
        shape = tuple(
            length if length == 1 else side for length, side in zip(weights.shape[2:], (height, width), strict=True)
        )
        if shape != weights.shape[2:]:
            weights = jax.image.resize(weights, (*weights.shape[:2], *shape), "linear")
        spread = jnp.broadcast_to(weights, (*weights.shape[:2], height, width))
        return LayerContexts(self.states, spread.reshape(*weights.shape[:2], height * width))


@partial(jax.tree_util.register_dataclass, data_fields=["states", "weights"], meta_fields=[])
@dataclass(frozen=True)
class LayerContexts:
    """R prompts for each picture in one layer, and their weights at each of its Q pixels.

    Attributes:
        states: (N, R, L, D).
        weights: (N, R, Q).
    """

    states: States
    weights: Float[Array, "N R Q"]

    def attend(
        self, query: Float[Array, "N Q H d"], attend: Callable[[Array, Any], Float[Array, "M Q H d"]]
    ) -> Float[Array, "N Q H d"]:
        """The weighted sum of what each prompt gives.

        Args:
            attend: attention of queries (M, Q, H, d) to prompts (M, L, D).
        """
        count, prompts = self.states.shape[:2]
        flat = jax.tree.map(lambda leaf: leaf.reshape(count * prompts, *leaf.shape[2:]), self.states)
        attended = attend(jnp.repeat(query, prompts, axis=0), flat).reshape(count, prompts, *query.shape[1:])
        weights = self.weights[..., None, None]
        return jnp.sum(weights * attended.astype(jnp.float32), axis=1).astype(query.dtype)


def cross_attention_layers(config: UNetConfig) -> tuple[Path, ...]:
    """The paths of a UNet's transformers, in the order in which they run.

    >>> cross_attention_layers(UNetConfig(cross_attention_dim=768))[5:8]
    (('down_blocks_2', 'attentions_1'), ('mid_block', 'attentions_0'), ('up_blocks_1', 'attentions_0'))
    """
    layers = config.layers_per_block
    down = enumerate(config.down_block_types)
    up = enumerate(config.up_block_types)
    return (
        *_paths("down_blocks", [block for block, kind in down if kind == "CrossAttnDownBlock2D"], layers),
        *_paths("mid_block", [None] * (config.mid_block_type == "UNetMidBlock2DCrossAttn"), 1),
        *_paths("up_blocks", [block for block, kind in up if kind == "CrossAttnUpBlock2D"], layers + 1),
    )


def _paths(name: str, blocks: Sequence[int | None], layers: int) -> Iterator[Path]:
    for block in blocks:
        for index in range(layers):
            yield name if block is None else f"{name}_{block}", f"attentions_{index}"
