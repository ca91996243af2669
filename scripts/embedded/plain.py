"""A plain CLIP: both towers at once on pictures and their captions, as Radford et al. 2021 train theirs, and no more.

The closed form is no part of its training: the end token alone is read, a picture has one right caption, projections
begin as random matrices, and nothing asks that a picture and its caption agree but the contrastive loss. What the
shipped checkpoint is told besides is in `embedded.clip`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from embedded.augment import random_views
from embedded.clip import Clip, unit
from embedded.data import end_places, examples
from embedded.stages import clip_of, judge_clip
from embedded.training import Budget, Tree, arithmetic, steps_at_once, train
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.sampling import resized
from sdipc_jax.models import CLIPTextModel, CLIPVisionModel

# Where OpenAI's learned factor of the cosines stops.
_SHARPEST = 100.0


def begin(clip: Clip, key: Array, sharpness: float) -> Tree:
    """Ordinary random towers and projections.

    Args:
        sharpness: the factor of the cosines to begin with, 1 / temperature.
    """
    keys = jax.random.split(key, 6)
    side, width = clip.vision.image_size, clip.text.projection_dim
    text = jax.jit(CLIPTextModel(clip.text).init)(keys[0], jnp.zeros((1, clip.text.max_position_embeddings), jnp.int32))
    vision = jax.jit(CLIPVisionModel(clip.vision).init)(keys[1], jnp.zeros((1, side, side, 3)))
    embeddings = text["params"]["text_model"]["embeddings"]
    for name, deviation, each in (("token_embedding", 0.02, keys[2]), ("position_embedding", 0.01, keys[3])):
        table = embeddings[name]["embedding"]
        embeddings[name]["embedding"] = deviation * jax.random.normal(each, table.shape)

    def projection(features: int, key: Array) -> Tree:
        return {"kernel": features**-0.5 * jax.random.normal(key, (features, width))}

    return {
        **text["params"],
        **vision["params"],
        "visual_projection": projection(clip.vision.hidden_size, keys[4]),
        "text_projection": projection(clip.text.hidden_size, keys[5]),
        "logit_scale": jnp.asarray(np.log(sharpness), jnp.float32),
    }


def contrastive_loss(
    clip: Clip, augmentation: Tree, params: Tree, data: Tree, batch: Tree, key: Array
) -> tuple[Float[Array, ""], Tree]:
    """The symmetric contrastive loss: of all captions of the batch a picture has its own, and the other way round.

    Args:
        data: `pixels` uint8, `may_flip`, token ids `plain` and `styled` (N, L).
        batch: `rows` of the data, and for which of them the caption is the one that names the `styled`.
    """
    rows = batch["rows"]
    pictures = random_views(data["pixels"][rows] / 255.0, data["may_flip"][rows], key, **augmentation)
    tokens = jnp.where(batch["styled"][:, None], data["styled"][rows], data["plain"][rows])
    states = clip.text_states(params, tokens, arithmetic())[jnp.arange(len(rows)), jnp.argmax(tokens, axis=1)]
    images = unit(clip.image_embeds(params, pictures, arithmetic()))
    texts = unit(states @ params["text_projection"]["kernel"])
    sharpness = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(_SHARPEST)))
    scores = sharpness * images @ texts.T
    right = jnp.arange(len(rows))

    def loss(scores: Array) -> Array:
        return -jnp.mean(jax.nn.log_softmax(scores, axis=1)[right, right])

    total = (loss(scores) + loss(scores.T)) / 2
    return total, {
        "loss": total,
        "batch_hit": jnp.mean(jnp.argmax(scores, axis=1) == right),
        "cosine": jnp.mean(jnp.sum(images * texts, axis=1)),
        "gap": jnp.linalg.norm(images.mean(axis=0) - texts.mean(axis=0)),
        "sharpness": sharpness,
    }


def train_plain(settings: Tree, corpus: Corpus, folder: Path, start: Tree) -> None:
    """Both towers, on every picture once before any comes again."""
    clip, options = clip_of(settings), settings["plain"]
    data = examples(corpus.where(corpus.split == "train"), folder / "tokenizer")
    # The tower is causal: what stands behind the end is never read.
    length = int(max(end_places(data.plain).max(), end_places(data.styled).max())) + 1
    side = clip.vision.image_size
    arrays = {
        "pixels": resized(data.pixels, side, side),
        "may_flip": data.may_flip,
        "plain": data.plain[:, :length],
        "styled": data.styled[:, :length],
    }
    train(
        "plain",
        start,
        partial(contrastive_loss, clip, options["augmentation"]),
        arrays,
        partial(shuffled, len(data.pixels), options["batch"], settings["seed"]),
        Budget(**options["budget"]),
        folder,
        seed=settings["seed"],
        evaluate=lambda params: judge_clip(clip, params, corpus, folder / "tokenizer", count=1024),
    )


def shuffled(pictures: int, count: int, seed: int, step: int) -> dict[str, Any]:
    """The rows of the next few steps, from a new order of all pictures an epoch."""
    steps = steps_at_once(8)
    per_epoch = pictures // count

    def rows(step: int) -> Int[np.ndarray, " N"]:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, 6, epoch)).permutation(pictures)
        return order[place * count : (place + 1) * count]

    styled = np.random.default_rng((seed, 7, step)).random((steps, count)) < 0.5
    return {"rows": np.stack([rows(each) for each in range(step, step + steps)]), "styled": styled}
