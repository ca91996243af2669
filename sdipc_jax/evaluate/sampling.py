"""Pictures to be judged: many prompts through one compiled sampler."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.prompts.prompt import AnyPrompt
from sdipc_jax.records import Report
from sdipc_jax.sampling.decoding import to_uint8
from sdipc_jax.sampling.sample import generate

Pictures = UInt8[np.ndarray, "N H W 3"]


@dataclass
class Sampler:
    """Samples prompts in batches of one size, and tells how far it is.

    Attributes:
        settings: of `generate`, the same for every picture.
        expected: how many pictures will be asked for in all.
    """

    bundle: Bundle
    settings: dict[str, Any]
    batch_size: int
    expected: int
    report: Report
    done: int = 0

    def __call__(self, context: AnyPrompt, seed: int, indices: Int[np.ndarray, " N"]) -> Pictures:
        """One picture a prompt: row n is variation `indices[n]` of the seed, as the command `vary` makes it."""
        goal = self.done + len(context)

        def sample(context: AnyPrompt, indices: Int[np.ndarray, " N"]) -> Pictures:
            prompts = jax.tree.map(jnp.asarray, context)
            pictures = to_uint8(generate(self.bundle, prompts, seeds=seed, indices=indices, **self.settings))
            self.done = min(self.done + self.batch_size, goal)
            self.report(min(1.0, self.done / self.expected))
            return pictures

        return in_batches(sample, jax.tree.map(np.asarray, context), indices, size=self.batch_size)


def reconstruct(bundle: Bundle, pictures: Pictures) -> Pictures:
    """Pictures through the VAE and back: the best that any prompt could reach."""
    return to_uint8(jnp.asarray(in_batches(partial(_there_and_back, bundle), pictures, size=8)))


@jax.jit
def _there_and_back(bundle: Bundle, pictures: Pictures) -> Float[Array, "N H W 3"]:
    again = apply(bundle.config.vae_model, bundle.params["vae"], jnp.asarray(pictures) / 127.5 - 1)
    return jnp.clip(again.astype(jnp.float32) / 2 + 0.5, 0, 1)


def resized(pictures: Pictures, height: int, width: int) -> Pictures:
    """Pictures as large as those that the checkpoint makes."""
    if pictures.shape[1:3] == (height, width):
        return pictures
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BICUBIC)) for each in pictures])
