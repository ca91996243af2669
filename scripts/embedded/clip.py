"""The CLIP stages: the text tower on pictures and their captions, teachers on its captions, the vision tower on them.

Three things differ from Radford et al. 2021. A picture has several right captions (its own with and without the
style, and those of the same thing drawn by others), so targets are spread over them. The text is read off at a random
place among the end token and the pads behind it, which are end tokens too: pads come to carry what the end token
carries, as they nearly do in OpenAI's CLIP, and that is what the method rests on. And the vision tower learns from
convolutional networks (`embedded.tower`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from embedded.augment import mixed, random_views, with_partners
from embedded.tower import ConvolutionalTower
from embedded.training import Tree, arithmetic
from sdipc_jax.checkpoints.bundle import apply
from sdipc_jax.models import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

# What each stage trains.
TEXT_STAGE = ("text_model", "text_projection", "logit_scale", "teacher_0")
VISION_STAGE = ("vision_model", "visual_projection")


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What all losses are told.

    Attributes:
        augmentation: options of `random_views`.
        sharpest: the factor of the cosines; the text stage learns it, up to this.
        agreement: weight of 1 - the cosine of each picture with its caption, or of both towers' embeddings of it, in
            C-space and in T-space.
    """

    augmentation: Tree
    sharpest: float
    agreement: float


@dataclasses.dataclass(frozen=True)
class Clip:
    """The two towers and the teachers; the towers' parameters are named as in transformers' CLIPModel.

    Attributes:
        channels: of each teacher.
        teachers: their parameters' names.
    """

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    channels: tuple[int, ...]
    teachers: tuple[str, ...]

    def init(self, key: Array) -> Tree:
        keys = jax.random.split(key, 5)
        size, width = self.vision.image_size, self.text.projection_dim
        tokens, pictures = jnp.zeros((1, self.text.max_position_embeddings), jnp.int32), jnp.zeros((1, size, size, 3))
        text = jax.jit(CLIPTextModel(self.text).init)(keys[0], tokens)
        vision = jax.jit(CLIPVisionModel(self.vision).init)(keys[1], pictures)
        tower = jax.jit(ConvolutionalTower(self.channels, width).init)
        teachers = {
            name: tower(each, pictures)["params"]
            for name, each in zip(self.teachers, jax.random.split(keys[4], len(self.teachers)), strict=True)
        }
        # Linen starts embeddings at variance 1 / width; OpenAI's CLIP at 0.02 and 0.01.
        embeddings = text["params"]["text_model"]["embeddings"]
        for name, deviation in (("token_embedding", 0.02), ("position_embedding", 0.01)):
            table = embeddings[name]["embedding"]
            embeddings[name]["embedding"] = deviation * jax.random.normal(keys[0], table.shape)
        _start_like_trained(vision["params"]["vision_model"], self.vision, keys[1])
        # Orthogonal, so that nothing is lost between text states and joint space to begin with.
        projections = {
            name: {"kernel": jax.nn.initializers.orthogonal()(key, (features, width))}
            for name, features, key in (
                ("visual_projection", self.vision.hidden_size, keys[2]),
                ("text_projection", self.text.hidden_size, keys[3]),
            )
        }
        return {
            **text["params"],
            **vision["params"],
            **projections,
            **teachers,
            "logit_scale": jnp.asarray(np.log(1 / 0.07), jnp.float32),
        }

    def text_states(self, params: Tree, tokens: Int[Array, "N L"], dtype: Any = jnp.float32) -> Float[Array, "N L D"]:
        states = apply(CLIPTextModel(self.text, dtype), {"text_model": params["text_model"]}, tokens)
        return states.astype(jnp.float32)

    def class_tokens(
        self, params: Tree, pictures: Float[Array, "N S S 3"], dtype: Any = jnp.float32
    ) -> Float[Array, "N D"]:
        """What the vision tower makes of pictures in [0, 1]."""
        tower = {"vision_model": params["vision_model"]}
        return apply(CLIPVisionModel(self.vision, dtype), tower, 2 * pictures - 1).astype(jnp.float32)

    def image_embeds(
        self, params: Tree, pictures: Float[Array, "N S S 3"], dtype: Any = jnp.float32
    ) -> Float[Array, "N J"]:
        """Joint embeddings of pictures by the vision tower."""
        return self.class_tokens(params, pictures, dtype) @ params["visual_projection"]["kernel"]

    def teacher_embeds(
        self, params: Tree, pictures: Float[Array, "N S S 3"], dtype: Any = jnp.float32
    ) -> Float[Array, "N J"]:
        """Joint embeddings of pictures by the teachers among the parameters: the mean of their directions."""
        taught = [params[name] for name in self.teachers if name in params]
        return sum((self._by_one(teacher, pictures, dtype) for teacher in taught), jnp.zeros(())) / len(taught)

    def _by_one(self, teacher: Tree, pictures: Float[Array, "N S S 3"], dtype: Any) -> Float[Array, "N J"]:
        tower = ConvolutionalTower(self.channels, self.text.projection_dim, dtype=dtype)
        return unit(apply(tower, teacher, pictures))

    def contrastive_loss(
        self, options: LossOptions, params: Tree, data: Tree, batch: Tree, key: Array
    ) -> tuple[Float[Array, ""], Tree]:
        """The contrastive loss with several right answers (targets uniform over them), both directions, and eq. 5.

        Args:
            data: `pixels` uint8, `may_flip`, token ids `plain` and `styled` (N, L), `label` and `style` of each
                picture, `all_captions` the joint embeddings of all labels' captions, rows of length 1.
            batch: `rows` of the data, and for which of them the caption is the one that names the `styled`.
        """
        keys = jax.random.split(key, 2)
        rows, styled = batch["rows"], batch["styled"]
        label, style = data["label"][rows], data["style"][rows]
        pictures = random_views(data["pixels"][rows] / 255.0, data["may_flip"][rows], keys[0], **options.augmentation)
        images = unit(self.teacher_embeds(params, pictures, arithmetic()))
        states = self._text_states(params, data, batch, keys[1])
        texts = unit(states @ params["text_projection"]["kernel"])
        # Without a limit the scale grows until pictures and captions need agree but little: the method rests on eq. 5,
        # that they point the same way.
        sharpness = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(options.sharpest)))
        same = label[:, None] == label[None, :]
        right = same & (~styled[None, :] | (style[:, None] == style[None, :]))
        total, hit = contrastive(images, texts, right, sharpness)
        # And where the closed form takes pictures: C-space does not see directions in which W_t is small.
        hidden = unit(images @ inverse(params))
        total_hidden, hidden_hit = contrastive(hidden, unit(states), right, sharpness)
        # Against all captions at once, as they stood a few steps ago: a batch holds few that are hard to tell apart.
        scores = sharpness * images @ data["all_captions"].T
        total_all = cross_entropy(scores, jax.nn.one_hot(label, scores.shape[1])) / 2
        # The contrastive losses do not change when all captions move one way, and left to themselves captions share a
        # direction that no picture has.
        cosine = jnp.mean(jnp.sum(images * texts, axis=1))
        hidden_cosine = jnp.mean(jnp.sum(hidden * unit(states), axis=1))
        total = total + total_hidden + total_all + options.agreement / 2 * (2 - cosine - hidden_cosine)
        found = jnp.mean(jnp.argmax(scores, axis=1) == label)
        return total, {
            "loss": total,
            "batch_hit": hit,
            "hidden_hit": hidden_hit,
            "hit": found,
            "cosine": cosine,
            "hidden_cosine": hidden_cosine,
            "logit_scale": sharpness,
        }

    def captions_loss(
        self, options: LossOptions, params: Tree, data: Tree, batch: Tree, key: Array
    ) -> tuple[Float[Array, ""], Tree]:
        """How far each teacher is from captions that stand, in both spaces: their cross-entropy, and eq. 5.

        Mixtures of two pictures have both captions (Zhang et al. 2018).

        Args:
            data: `pixels` uint8, `may_flip`, `to_states` the inverse of W_t; the captions without and with the style
                as `plain` and `styled`: `of` each picture its row, `joint` embeddings and `states` of end tokens, rows
                of length 1.
            batch: `rows` of the data.
        """
        keys = jax.random.split(key, 2)
        rows = batch["rows"]
        pictures = random_views(data["pixels"][rows] / 255.0, data["may_flip"][rows], keys[0], **options.augmentation)
        pictures, weight = mixed(pictures, keys[1])
        total, cosine = jnp.zeros(()), jnp.zeros(())
        embeds = [self._by_one(params[name], pictures, arithmetic()) for name in self.teachers]
        spaces = {"joint": embeds, "states": [unit(found @ data["to_states"]) for found in embeds]}
        for captions in (data["plain"], data["styled"]):
            targets = with_partners(jax.nn.one_hot(captions["of"][rows], len(captions["joint"])), weight)
            for space, by_teacher in spaces.items():
                wanted = unit(targets @ captions[space])
                for found in by_teacher:
                    near = jnp.mean(jnp.sum(found * wanted, axis=1))
                    total += cross_entropy(options.sharpest * found @ captions[space].T, targets) / 2
                    total += options.agreement / 4 * (1 - near)
                    cosine += near / (4 * len(embeds))
        nearest = jnp.argmax(sum(embeds, jnp.zeros(())) @ data["plain"]["joint"].T, axis=1)
        unmixed = weight == 0
        hit = jnp.sum(unmixed & (nearest == data["plain"]["of"][rows])) / jnp.sum(unmixed)
        return total, {"loss": total, "hit": hit, "cosine": cosine}

    def distillation_loss(
        self, options: LossOptions, params: Tree, data: Tree, batch: Tree, key: Array
    ) -> tuple[Float[Array, ""], Tree]:
        """How far the vision tower is from the teachers, on views of pictures and on mixtures of two.

        They say which captions a picture has and how near each is, for any picture at all, so that pictures can be
        made up: both have to be one function (Beyer et al. 2022), and not only to agree on the drawings.

        Args:
            data: `pixels` uint8, `may_flip`, `to_states` the inverse of W_t, `teachers` their parameters, `joint`
                embeddings of captions and `states` of their end tokens, rows of length 1.
            batch: `rows` of the data.
        """
        keys = jax.random.split(key, 2)
        rows, to_states = batch["rows"], data["to_states"]
        pictures = random_views(data["pixels"][rows] / 255.0, data["may_flip"][rows], keys[0], **options.augmentation)
        pictures, _ = mixed(pictures, keys[1])
        wanted = unit(jax.lax.stop_gradient(self.teacher_embeds(data["teachers"], pictures, arithmetic())))
        found = unit(self.image_embeds(params, pictures, arithmetic()))
        hidden, wanted_hidden = unit(found @ to_states), unit(wanted @ to_states)
        apart, hit = divergence(found, wanted, data["joint"], options.sharpest)
        hidden_apart, _ = divergence(hidden, wanted_hidden, data["states"], options.sharpest)
        cosine = jnp.mean(jnp.sum(found * wanted, axis=1))
        hidden_cosine = jnp.mean(jnp.sum(hidden * wanted_hidden, axis=1))
        total = apart + hidden_apart + options.agreement / 2 * (2 - cosine - hidden_cosine)
        return total, {
            "loss": total,
            "divergence": apart,
            "hidden_divergence": hidden_apart,
            "hit": hit,
            "cosine": cosine,
            "hidden_cosine": hidden_cosine,
        }

    def _text_states(self, params: Tree, data: Tree, batch: Tree, key: Array) -> Float[Array, "N D"]:
        """One state of each picture's caption: the end token's, or in half of them that of a pad behind it."""
        rows, styled = batch["rows"], batch["styled"][:, None]
        keys = jax.random.split(key)
        tokens = jnp.where(styled, data["styled"][rows], data["plain"][rows])
        end = jnp.argmax(tokens, axis=1)
        states = self.text_states(params, tokens, arithmetic())
        anywhere = jax.random.randint(keys[0], end.shape, end, tokens.shape[1])
        at = jnp.where(jax.random.bernoulli(keys[1], 0.5, anywhere.shape), anywhere, end)
        return states[jnp.arange(len(at)), at]


def contrastive(
    images: Float[Array, "N D"], texts: Float[Array, "N D"], right: Bool[Array, "N N"], sharpness: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The contrastive loss of rows of length 1, and how many pictures are nearest to a right text."""
    logits = sharpness * images @ texts.T
    total = jnp.zeros(())
    for scores, targets in ((logits, right), (logits.T, right.T)):
        total += cross_entropy(scores, targets / targets.sum(axis=1, keepdims=True)) / 2
    hit = jnp.mean(jnp.take_along_axis(right, jnp.argmax(logits, axis=1)[:, None], axis=1))
    return total, hit


def cross_entropy(scores: Float[Array, "N M"], targets: Float[Array, "N M"]) -> Float[Array, ""]:
    """Of targets of which 0.05 is spread evenly."""
    targets = 0.95 * targets + 0.05 / scores.shape[1]
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(scores, axis=1), axis=1))


def divergence(
    found: Float[Array, "N D"], wanted: Float[Array, "N D"], texts: Float[Array, "M D"], sharpness: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of the chances of the texts by `found` from those by `wanted`; and how often both have the same text nearest."""
    targets, scores = (jax.nn.log_softmax(sharpness * rows @ texts.T, axis=1) for rows in (wanted, found))
    total = jnp.mean(jnp.sum(jnp.exp(targets) * (targets - scores), axis=1))
    return total, jnp.mean(jnp.argmax(scores, axis=1) == jnp.argmax(targets, axis=1))


def inverse(params: Tree) -> Float[Array, "J D"]:
    """The raw inverse of the text projection, which has to be square."""
    return jnp.linalg.inv(params["text_projection"]["kernel"])


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
