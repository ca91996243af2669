"""The VAE stage: pictures to 8x8x4 latents and back."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from embedded.augment import random_views
from embedded.training import Tree
from sdipc_jax.checkpoints.bundle import apply
from sdipc_jax.models import AutoencoderKL, VAEConfig


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The losses of the stage: all of it, or the decoder on the latents of an encoder that stands."""

    config: VAEConfig
    kl_weight: float
    coarse_weight: float = 0.5

    def init(self, key: Array) -> Tree:
        return jax.jit(AutoencoderKL(self.config).init)(key, jnp.zeros((1, 64, 64, 3)))["params"]

    def encode(self, params: Tree, pictures: Float[Array, "N H W 3"]) -> tuple[Array, Array]:
        """Mean and log variance of the latents of pictures in [0, 1]."""
        return apply(AutoencoderKL(self.config), params, 2 * pictures - 1, method="encode")

    def decode(self, params: Tree, latents: Float[Array, "N h w C"]) -> Float[Array, "N H W 3"]:
        """Pictures, about in [0, 1]."""
        return 0.5 + 0.5 * apply(AutoencoderKL(self.config), params, latents, method="decode")

    def loss(
        self, params: Tree, data: Tree, batch: Tree, key: Array, *, augmentation: Tree
    ) -> tuple[Float[Array, ""], Tree]:
        """L1 and L2 at full size, L1 at a half and a quarter, L1 of differences, and KL to the unit normal."""
        keys = jax.random.split(key)
        rows = batch["rows"]
        pictures = random_views(data["pixels"][rows] / 255.0, data["may_flip"][rows], keys[0], **augmentation)
        mean, log_variance = self.encode(params, pictures)
        latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(keys[1], mean.shape)
        error = self.decode(params, latents) - pictures
        absolute, square = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
        coarse = sum(jnp.mean(jnp.abs(_shrink(error, factor))) for factor in (2, 4))
        edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        total = absolute + 2 * square + self.coarse_weight * (coarse + edges) + self.kl_weight * kl
        psnr = -10 * jnp.log10(square)
        return total, {
            "loss": total,
            "l1": absolute,
            "mse": square,
            "psnr": psnr,
            "kl": kl,
            "latent_std": jnp.std(mean),
        }


def _shrink(x: Float[Array, "N H W C"], factor: int) -> Float[Array, "N h w C"]:
    count, height, width, channels = x.shape
    return x.reshape(count, height // factor, factor, width // factor, factor, channels).mean(axis=(2, 4))
