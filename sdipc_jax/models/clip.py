"""The two towers of CLIP (Radford et al. 2021), as transformers has them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sdipc_jax.models.attention import dot_product_attention
from sdipc_jax.models.config import CLIPTextConfig, CLIPVisionConfig
from sdipc_jax.models.given import Embed, Given
from sdipc_jax.models.layers import ACTIVATIONS, DType, conv, dense, layer_norm

Config = CLIPTextConfig | CLIPVisionConfig


class CLIPAttention(nn.Module):
    """Multi-head self-attention with biases: `q_proj`, `k_proj`, `v_proj`, `out_proj`."""

    heads: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "N Q D"],
        x: Float[Array, "N K D"],
        mask: Bool[Array, "Q K"] | None = None,
        prompts: Float[Array, "N P D"] | None = None,
    ) -> Float[Array, "N Q D"]:
        """Of the tokens `queries` to all tokens of `x`, and to the prompts."""
        width = x.shape[-1]
        read = [x] if prompts is None else [x, prompts]

        def heads_of(states: list[Float[Array, "N K D"]], name: str) -> Float[Array, "N K2 heads depth"]:
            layer = dense(width, self.dtype, name=name)
            projected = jnp.concatenate([layer(each) for each in states], axis=1)
            return projected.reshape(*projected.shape[:-1], self.heads, width // self.heads)

        heads = heads_of([queries], "q_proj"), heads_of(read, "k_proj"), heads_of(read, "v_proj")
        return dense(width, self.dtype, name="out_proj")(dot_product_attention(*heads, mask).reshape(queries.shape))


class CLIPMLP(nn.Module):
    """Two linear layers around the configured activation."""

    config: Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N K D"]) -> Float[Array, "N K D"]:
        hidden = dense(self.config.intermediate_size, self.dtype, name="fc1")(x)
        return dense(x.shape[-1], self.dtype, name="fc2")(ACTIVATIONS[self.config.hidden_act](hidden))


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to its input; of the first `tokens` tokens, or of all.

    `prompts` are tokens that all others look at, and of which nothing comes out.
    """

    config: Config
    tokens: int | None = None
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N K D"],
        mask: Bool[Array, "Q K"] | None = None,
        prompts: Float[Array, "N P D"] | None = None,
    ) -> Float[Array, "N Q D"]:
        epsilon = self.config.layer_norm_eps
        norm = layer_norm(epsilon, self.dtype, name="layer_norm1")
        normed, normed_prompts = norm(x), None if prompts is None else norm(prompts)
        attention = CLIPAttention(self.config.num_attention_heads, self.dtype, name="self_attn")
        x = x[:, : self.tokens] + attention(normed[:, : self.tokens], normed, mask, normed_prompts)
        normed = layer_norm(epsilon, self.dtype, name="layer_norm2")(x)
        return x + CLIPMLP(self.config, self.dtype, name="mlp")(normed)


class CLIPLayers(nn.Module):
    """The stack of layers, named 0, 1, 2, ... below `layers` as in the checkpoint: what goes into the first and what
    comes out of each.

    The last one gives the first `tokens` tokens alone, if so many are all that is read.
    """

    config: Config
    tokens: int | None = None
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N K D"],
        mask: Bool[Array, "K K"] | None = None,
        deep_prompts: Float[Array, "*N layers P D"] | None = None,
        overwrite: bool = False,
    ) -> tuple[Float[Array, "N _ D"], ...]:
        states = [x]
        for index in range(self.config.num_hidden_layers):
            prompts = None
            if deep_prompts is not None:
                # Each layer has its own, so that what a layer makes of them is not needed.
                prompts = deep_prompts[..., index, :, :]
                prompts = jnp.broadcast_to(prompts, (x.shape[0], *prompts.shape[-2:])).astype(x.dtype)
                if overwrite and index == 0:
                    x = jnp.concatenate([x[:, :1], x[:, 1 + prompts.shape[1] :]], axis=1)
            tokens = self.tokens if index == self.config.num_hidden_layers - 1 else None
            x = CLIPEncoderLayer(self.config, tokens, self.dtype, name=str(index))(x, mask, prompts)
            states.append(x)
        return tuple(states)


class CLIPEncoder(nn.Module):
    """Holds `layers`."""

    config: Config
    tokens: int | None = None
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N K D"],
        mask: Bool[Array, "K K"] | None = None,
        deep_prompts: Float[Array, "*N layers P D"] | None = None,
        overwrite: bool = False,
    ) -> tuple[Float[Array, "N _ D"], ...]:
        return CLIPLayers(self.config, self.tokens, self.dtype, name="layers")(x, mask, deep_prompts, overwrite)


def _embed(count: int, features: int, dtype: DType, name: str) -> Embed:
    return Embed(count, features, dtype=dtype, param_dtype=dtype, name=name)


class CLIPTextEmbeddings(nn.Module):
    """Token plus position. Ids from the vocabulary's end on are rows of a table of their own, if there is one."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "N L"], rows: Float[Array, "V D"] | None = None) -> Float[Array, "N L D"]:
        config = self.config
        words = _embed(config.vocab_size, config.hidden_size, self.dtype, "token_embedding")(tokens)
        if rows is not None:
            beyond = tokens - config.vocab_size
            words = jnp.where((beyond >= 0)[..., None], rows.astype(words.dtype)[jnp.maximum(beyond, 0)], words)
        places = _embed(config.max_position_embeddings, config.hidden_size, self.dtype, "position_embedding")
        return words + places(jnp.arange(tokens.shape[1]))


# What goes into the first layer of a text tower and what comes out of each, without the final norm.
HiddenStates = tuple[Float[Array, "N L D"], ...]


class CLIPTextTransformer(nn.Module):
    """Embeddings, causal layers, final norm: the last states after it, and those of all layers without.

    The norm is that of the layer `skip` before the last.
    """

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "N L"], rows: Float[Array, "V D"] | None = None, skip: int = 0
    ) -> tuple[Float[Array, "N L D"], HiddenStates]:
        x = CLIPTextEmbeddings(self.config, self.dtype, name="embeddings")(tokens, rows)
        causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
        states = CLIPEncoder(self.config, dtype=self.dtype, name="encoder")(x, causal)
        return layer_norm(self.config.layer_norm_eps, self.dtype, name="final_layer_norm")(states[-1 - skip]), states


class CLIPTextModel(nn.Module):
    """The text tower: the states that the UNet of Stable Diffusion 1.x and 2.x reads, after the final norm.

    With `output_hidden_states` those of all layers too, as SDXL reads them. `rows` are embeddings of words that the
    vocabulary has not, and `skip` leaves out the last layers.
    """

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "N L"],
        rows: Float[Array, "V D"] | None = None,
        *,
        skip: int = 0,
        output_hidden_states: bool = False,
    ) -> Any:
        last, states = CLIPTextTransformer(self.config, self.dtype, name="text_model")(tokens, rows, skip)
        return (last, states) if output_hidden_states else last


class CLIPTextModelWithProjection(nn.Module):
    """SDXL's second text tower: a text's point in the joint space, and the states of all layers."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "N L"], ends: Int[Array, " N"], rows: Float[Array, "V D"] | None = None
    ) -> tuple[Float[Array, "N P"], HiddenStates]:
        """Reads texts.

        Args:
            ends: the place of each text's end token, whose last state is projected.
            rows: embeddings of words that the vocabulary has not.
        """
        last, states = CLIPTextTransformer(self.config, self.dtype, name="text_model")(tokens, rows)
        projection = dense(self.config.projection_dim, self.dtype, use_bias=False, name="text_projection")
        return projection(jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]), states


class CLIPVisionEmbeddings(Given):
    """A class token before the patches, plus positions."""

    config: CLIPVisionConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N K D"]:
        config = self.config
        patch, width = config.patch_size, config.hidden_size
        class_embedding = self.param("class_embedding", nn.initializers.normal(0.02), (width,), self.dtype)
        patches = conv(width, patch, self.dtype, stride=patch, use_bias=False, name="patch_embedding")(pixels)
        patches = patches.reshape(pixels.shape[0], -1, width)
        first = jnp.broadcast_to(class_embedding, (pixels.shape[0], 1, width))
        x = jnp.concatenate([first, patches], axis=1)
        places = _embed((config.image_size // patch) ** 2 + 1, width, self.dtype, "position_embedding")
        return x + places(jnp.arange(x.shape[1]))


class CLIPVisionTransformer(nn.Module):
    """Embeddings, norm, layers, and the norm of the class token.

    `deep_prompts`, one set for all pictures or one for each, stand beside the class token and the patches in every
    layer. With `overwrite` the first layer's take the place of patches. `extra_norm` comes before the last norm.
    """

    config: CLIPVisionConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "N S S 3"],
        deep_prompts: Float[Array, "*N layers P D"] | None = None,
        overwrite: bool = False,
        extra_norm: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "N D"]:
        epsilon = self.config.layer_norm_eps
        x = CLIPVisionEmbeddings(self.config, self.dtype, name="embeddings")(pixels.astype(self.dtype))
        # The checkpoints' own spelling.
        x = layer_norm(epsilon, self.dtype, name="pre_layrnorm")(x)
        x = CLIPEncoder(self.config, 1, self.dtype, name="encoder")(x, None, deep_prompts, overwrite)[-1][:, 0]
        if extra_norm is not None:
            x = extra_norm(x)
        return layer_norm(epsilon, self.dtype, name="post_layernorm")(x)


class CLIPVisionModel(nn.Module):
    """The vision tower: the class token after the last norm (`pooler_output` in transformers).

    `deep_prompts`, if given, stand beside the class token and the patches in every layer (VPT-deep, Jia et al. 2022;
    SD-IPC section 4.2).
    """

    config: CLIPVisionConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "N S S 3"], deep_prompts: Float[Array, "layers P D"] | None = None
    ) -> Float[Array, "N D"]:
        return CLIPVisionTransformer(self.config, self.dtype, name="vision_model")(pixels, deep_prompts)
