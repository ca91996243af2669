"""A picture to start from: img2img, and inpainting with a mask of what is redone.

start = sampling.start_from(bundle, pictures, strength=0.6)
pictures = sdipc.generate(bundle, context, start=start, seeds=0)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.errors import InputError
from sdipc_jax.executables import kept_program


@partial(jax.tree_util.register_dataclass, data_fields=["latents", "mask", "masked_latents"], meta_fields=["strength"])
@dataclass(frozen=True)
class Start:
    """What sampling starts from in the place of noise alone. A pytree with rows.

    Attributes:
        latents: of the pictures, in the UNet's scale, (N, h, w, C).
        mask: 1 where the picture is redone, 0 where it stays, (N, h, w, 1); None for all of it.
        masked_latents: of the pictures without what is redone, for UNets that were trained to repaint; None for others.
        strength: the share of the steps that are taken, (0, 1]. Static.
    """

    latents: Float[Array, "N h w C"]
    mask: Float[Array, "N h w 1"] | None
    masked_latents: Float[Array, "N h w C"] | None
    strength: float


@partial(jax.tree_util.register_dataclass, data_fields=["latents", "noise", "mask", "channels"], meta_fields=[])
@dataclass(frozen=True)
class Repainting:
    """What the loop reads to keep a picture where its mask is 0. A pytree with rows.

    Attributes:
        latents, noise: of the picture, and those that it started with, (N, h, w, C).
        mask: (N, h, w, 1).
        channels: what a UNet that was trained to repaint reads besides, (N, h, w, 1 + C): mask and masked latents. It
            keeps the picture itself. None for others: for them what stays is put back after every step.
    """

    latents: Float[Array, "N h w C"]
    noise: Float[Array, "N h w C"]
    mask: Float[Array, "N h w 1"]
    channels: Float[Array, "N h w _"] | None

    def keep(self, x: Float[Array, "N h w C"], signal: Any, share: Any) -> Float[Array, "N h w C"]:
        """x with the picture where nothing is redone, as noisy as x is: of this much signal and share of noise."""
        if self.channels is not None:
            return x
        original = signal * self.latents + share * self.noise
        return self.mask * x + (1 - self.mask) * original


def start_from(
    bundle: Bundle,
    pictures: Float[Array | np.ndarray, "N H W 3"],
    strength: float,
    mask: Float[Array | np.ndarray, "N H W"] | None = None,
) -> Start:
    """A start from pictures in [0, 1].

    Args:
        strength: the share of the steps that are taken: 1 redoes everything, little changes little (SDEdit, Meng et al.
            2022).
        mask: 1 (from 0.5) where pictures are redone; all of them if None.

    Raises:
        InputError: a strength outside of (0, 1], a mask of another size or without anything to redo, or a UNet that was
            trained to repaint and no mask.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}, expected more than 0 and at most 1: choose another")
    pictures = jnp.asarray(pictures, jnp.float32)
    repaints = bundle.config.unet.repaints
    if mask is None:
        if repaints:
            raise InputError("this UNet was trained to repaint a part of a picture, and there is no mask: give one")
        return Start(encode_pictures(bundle, pictures), None, None, float(strength))
    if np.shape(mask) != pictures.shape[:3]:
        raise InputError(f"the mask has shape {np.shape(mask)}, expected {pictures.shape[:3]}, as the pictures have")
    if not isinstance(mask, jax.Array) and not (np.asarray(mask) >= 0.5).any(axis=(1, 2)).all():
        raise InputError("a mask is black everywhere, expected white where the picture is redone: invert it")
    redone = (jnp.asarray(mask) >= 0.5).astype(jnp.float32)[..., None]
    f = bundle.config.vae.downscale
    # The nearest place, as diffusers has it.
    small = redone[:, ::f, ::f]
    masked = encode_pictures(bundle, jnp.where(redone > 0, 0.5, pictures)) if repaints else None
    return Start(encode_pictures(bundle, pictures), small, masked, float(strength))


@kept_program()
def encode_pictures(bundle: Bundle, pictures: Float[Array, "N H W 3"]) -> Float[Array, "N h w C"]:
    """The mean of the latents of pictures in [0, 1], in the UNet's scale, float32."""
    return posterior(bundle, 2 * pictures.astype(jnp.float32) - 1)[0]


def posterior(
    bundle: Bundle, scaled: Float[Array, "N H W 3"]
) -> tuple[Float[Array, "N h w C"], Float[Array, "N h w C"]]:
    """Mean and standard deviation of the latents of pictures in [-1, 1], in the UNet's scale, float32."""
    vae = bundle.config.vae
    mean, log_variance = apply(bundle.config.vae_model, bundle.params["vae"], scaled, method="encode")
    deviation = jnp.exp(0.5 * log_variance.astype(jnp.float32))
    return vae.scaling_factor * mean.astype(jnp.float32), vae.scaling_factor * deviation


def first_evaluation(strength: float, steps: int) -> int:
    """Where a run of so many steps begins, counted as diffusers does.

    Raises:
        InputError: the strength leaves no step.

    >>> first_evaluation(0.3, 50)
    35
    """
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise InputError(
            f"strength is {strength}, which of {steps} steps leaves none: raise the strength or take more steps"
        )
    return steps - taken


def started(
    start: Start, noise: Float[Array, "N h w C"], levels: Any, init_noise_sigma: Any
) -> tuple[Float[Array, "N h w C"], Repainting | None]:
    """The first x, and what the loop needs to keep what is not redone.

    Args:
        noise: of unit variance.
        levels: the schedule's.
    """
    signal, share = levels
    x = signal[0] * start.latents + share[0] * noise
    if start.mask is None:
        return x, None
    if start.strength == 1:
        # With all steps to take, what is redone owes nothing to the picture.
        x = init_noise_sigma * noise
    channels = None
    if start.masked_latents is not None:
        channels = jnp.concatenate([start.mask, start.masked_latents], axis=-1)
    return x, Repainting(start.latents, noise, start.mask, channels)
