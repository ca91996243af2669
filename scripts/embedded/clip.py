"""The CLIP stage: both towers from scratch on pictures and their captions, and how well they find each other.

Three things differ from Radford et al. 2021. A picture has several right captions (its own with and without the
style, and those of the same thing drawn by others), so targets are spread over them. The vision tower sees a random
half of the patches in most steps (FLIP, Li et al. 2023), which halves its cost. And the text is read off at a random
place among the end token and the pads behind it, which are end tokens too: pads come to carry what the end token
carries, as they nearly do in OpenAI's CLIP, and that is what the method rests on.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from embedded.augment import random_views
from embedded.training import Tree, arithmetic
from sdipc_jax.bundle import apply
from sdipc_jax.models import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from sdipc_jax.models.clip import CLIPEncoder
from sdipc_jax.models.layers import layer_norm


@dataclasses.dataclass(frozen=True)
class Clip:
    """The two towers; parameters are named as in transformers' CLIPModel."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig

    def init(self, key: Array) -> Tree:
        keys = jax.random.split(key, 4)
        size, width = self.vision.image_size, self.text.projection_dim
        tokens = jnp.zeros((1, self.text.max_position_embeddings), jnp.int32)
        text = jax.jit(CLIPTextModel(self.text).init)(keys[0], tokens)
        vision = jax.jit(CLIPVisionModel(self.vision).init)(keys[1], jnp.zeros((1, size, size, 3)))
        # Linen starts embeddings at variance 1 / width; OpenAI's CLIP at 0.02 and 0.01.
        embeddings = text["params"]["text_model"]["embeddings"]
        for name, deviation in (("token_embedding", 0.02), ("position_embedding", 0.01)):
            table = embeddings[name]["embedding"]
            embeddings[name]["embedding"] = deviation * jax.random.normal(keys[0], table.shape)
        _start_like_trained(vision["params"]["vision_model"], self.vision, keys[1])
        projections = {
            name: {"kernel": jax.random.normal(key, (features, width)) * features**-0.5}
            for name, features, key in (
                ("visual_projection", self.vision.hidden_size, keys[2]),
                ("text_projection", self.text.hidden_size, keys[3]),
            )
        }
        return {
            **text["params"],
            **vision["params"],
            **projections,
            "logit_scale": jnp.asarray(np.log(1 / 0.07), jnp.float32),
        }

    def text_states(self, params: Tree, tokens: Int[Array, "N L"], dtype: Any = jnp.float32) -> Float[Array, "N L D"]:
        states = apply(CLIPTextModel(self.text, dtype), {"text_model": params["text_model"]}, tokens)
        return states.astype(jnp.float32)

    def image_features(self, params: Tree, pictures: Float[Array, "N S S 3"]) -> Float[Array, "N D"]:
        """Features of pictures in [0, 1]."""
        return apply(CLIPVisionModel(self.vision), {"vision_model": params["vision_model"]}, 2 * pictures - 1)

    def masked_features(
        self, params: Tree, pictures: Float[Array, "N S S 3"], kept: int, key: Array
    ) -> Float[Array, "N D"]:
        """`image_features` of `kept` random patches of each picture, with the parts of the tower itself."""
        config, params = self.vision, params["vision_model"]
        count, patch, side = len(pictures), config.patch_size, config.image_size // config.patch_size
        blocks = (2 * pictures - 1).reshape(count, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        table = params["embeddings"]
        places = table["position_embedding"]["embedding"]
        if kept < side * side:
            chosen = jnp.argsort(jax.random.uniform(key, (count, side * side)), axis=1)[:, :kept]
        else:
            chosen = jnp.broadcast_to(jnp.arange(kept), (count, kept))
        blocks = jnp.take_along_axis(blocks.reshape(count, side * side, -1), chosen[:, :, None], axis=1)
        kernel = table["patch_embedding"]["kernel"]
        patches = blocks @ kernel.reshape(-1, kernel.shape[-1]) + places[1 + chosen]
        first = jnp.broadcast_to(table["class_embedding"] + places[0], (count, 1, config.hidden_size))
        x = jnp.concatenate([first, patches], axis=1)

        def norm(name: str, x: Array) -> Array:
            return apply(layer_norm(config.layer_norm_eps, jnp.float32), params[name], x)

        x = apply(CLIPEncoder(config, arithmetic()), params["encoder"], norm("pre_layrnorm", x))
        return norm("post_layernorm", x[:, 0])

    def loss(
        self,
        params: Tree,
        data: Tree,
        batch: Tree,
        key: Array,
        *,
        augmentation: Tree,
        seen: float,
        prefix: int,
        sharpest: float,
        agreement: float,
    ) -> tuple[Float[Array, ""], Tree]:
        """The contrastive loss with several right answers (targets uniform over them), both directions, and eq. 5.

        Args:
            data: `pixels` uint8, `may_flip`, token ids `plain` and `styled` (N, L) or, where the text tower stands, the
                end token's `plain_states` and `styled_states` (N, D), `label` and `style` of each picture,
                `all_captions` the joint embeddings of all labels' captions, rows of length 1.
            batch: `rows` of the data, and for which of them the caption is the one that names the `styled`.
            seen: the share of the patches that the vision tower sees.
            prefix: captions are run to this many tokens, which keeps the states exact; the few that are longer lose
                words, not their end.
            sharpest: the largest factor of the cosines.
            agreement: weight of 1 - the cosine of each picture and its caption.
        """
        keys = jax.random.split(key, 3)
        rows, styled = batch["rows"], batch["styled"]
        label, style = data["label"][rows], data["style"][rows]
        kept = round(seen * (self.vision.image_size // self.vision.patch_size) ** 2)
        pictures = random_views(data["pixels"][rows] / 255.0, data["may_flip"][rows], keys[0], **augmentation)
        images = unit(self.masked_features(params, pictures, kept, keys[1]) @ params["visual_projection"]["kernel"])
        texts = unit(self._text_states(params, data, batch, keys[2], prefix) @ params["text_projection"]["kernel"])
        # Without a limit the scale grows until pictures and captions need agree but little: the method rests on eq. 5,
        # that they point the same way.
        sharpness = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(sharpest)))
        logits = sharpness * images @ texts.T
        same = label[:, None] == label[None, :]
        right = same & (~styled[None, :] | (style[:, None] == style[None, :]))
        total = jnp.zeros(())
        for scores, targets in ((logits, right), (logits.T, right.T)):
            targets = targets / targets.sum(axis=1, keepdims=True)
            targets = 0.95 * targets + 0.05 / len(targets)
            total += -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(scores, axis=1), axis=1)) / 2
        # Against all captions at once, as they stood a few steps ago: a batch holds few that are hard to tell apart.
        scores = sharpness * images @ data["all_captions"].T
        targets = 0.95 * jax.nn.one_hot(label, scores.shape[1]) + 0.05 / scores.shape[1]
        total += -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(scores, axis=1), axis=1)) / 2
        # The contrastive losses do not change when all captions move one way, and left to themselves captions share a
        # direction that no picture has.
        cosine = jnp.mean(jnp.sum(images * texts, axis=1))
        total += agreement * (1 - cosine)
        hit = jnp.mean(jnp.take_along_axis(right, jnp.argmax(logits, axis=1)[:, None], axis=1))
        found = jnp.mean(jnp.argmax(scores, axis=1) == label)
        return total, {"loss": total, "batch_hit": hit, "hit": found, "cosine": cosine, "logit_scale": sharpness}

    def _text_states(self, params: Tree, data: Tree, batch: Tree, key: Array, prefix: int) -> Float[Array, "N D"]:
        """One state of each picture's caption: the end token's, or in half of them that of a pad behind it."""
        rows, styled = batch["rows"], batch["styled"][:, None]
        if "plain_states" in data:
            return jnp.where(styled, data["styled_states"][rows], data["plain_states"][rows])
        keys = jax.random.split(key)
        tokens = jnp.where(styled, data["styled"][rows], data["plain"][rows])
        end = jnp.minimum(jnp.argmax(tokens, axis=1), prefix - 1)
        tokens = tokens[:, :prefix].at[:, -1].set(self.text.vocab_size - 1)
        states = self.text_states(params, tokens, arithmetic())
        anywhere = jax.random.randint(keys[0], end.shape, end, prefix)
        at = jnp.where(jax.random.bernoulli(keys[1], 0.5, anywhere.shape), anywhere, end)
        return states[jnp.arange(len(at)), at]


def _start_like_trained(tower: Tree, config: CLIPVisionConfig, key: Array) -> None:
    """Gives a vision tower the structure that trained ones have, in place: few pictures teach it far more slowly.

    Positions begin as sinusoids of row and column, queries and keys as near multiples of each other, so that tokens
    look at their neighbours, and values with their output map as near minus the identity (Trockman and Kolter 2023,
    eqs. 4 and 5, with the paper's weights of 0.7 and 0.4).
    """
    width, heads, side = config.hidden_size, config.num_attention_heads, config.image_size // config.patch_size
    depth, identity = width // heads, np.eye(width)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    for index in range(config.num_hidden_layers):
        attention = tower["encoder"]["layers"][str(index)]["self_attn"]
        queries, keys = [], []
        for _ in range(heads):
            u, s, vt = np.linalg.svd(0.7 * rng.normal(size=(width, width)) * depth**-0.5 + 0.7 * identity)
            queries.append(u[:, :depth] * np.sqrt(s[:depth]))
            keys.append(vt[:depth].T * np.sqrt(s[:depth]))
        u, s, vt = np.linalg.svd(0.4 * rng.normal(size=(width, width)) * width**-0.5 - 0.4 * identity)
        kernels = {
            "q_proj": np.concatenate(queries, axis=1),
            "k_proj": np.concatenate(keys, axis=1),
            "v_proj": u * np.sqrt(s),
            "out_proj": np.sqrt(s)[:, None] * vt,
        }
        for name, kernel in kernels.items():
            attention[name]["kernel"] = jnp.asarray(kernel, jnp.float32)
    angles = np.arange(side)[:, None] * 10000.0 ** -(np.arange(width // 4) / (width // 4))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(waves, side, axis=0), np.tile(waves, (side, 1))
    places = np.concatenate([np.zeros((1, width)), np.concatenate([rows, columns], axis=1)])
    tower["embeddings"]["position_embedding"]["embedding"] = jnp.asarray(places, jnp.float32)


def unit(x: Any) -> Any:
    """Rows of length 1, of an array of NumPy or JAX, (N, D)."""
    return x / (x**2).sum(axis=-1, keepdims=True) ** 0.5
