"""Latents become pictures, and those that the safety checker flags become black."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.errors import InputError
from sdipc_jax.executables import kept_program
from sdipc_jax.models import winograd
from sdipc_jax.sampling.request import State
from sdipc_jax.sampling.safety import flag_pictures
from sdipc_jax.tracing import under_our_rules

NOT_FINITE = (
    "a picture came out as NaN, expected finite numbers: with dtype {dtype} this checkpoint's are too large, or its "
    "weights are damaged: use --dtype bfloat16 or float32, or another checkpoint"
)
# The largest batch that the VAE decodes at once, in pixels: its activations are what takes most memory.
_DECODED_PIXELS = 512 * 512


@kept_program()
@under_our_rules
def finish(bundle: Bundle, state: State) -> tuple[Float[Array, "N H W 3"], Bool[Array, " N"]]:
    """Decodes latents to pictures in [0, 1], and blackens those that the safety checker flags."""
    config, latents = bundle.config, state[0]
    pixels = latents.shape[1] * latents.shape[2] * config.vae.downscale**2
    kernels = winograd.transformed(config.vae_model, bundle.params["vae"], latents[:1], method="decode")
    vae = {"params": bundle.params["vae"], winograd.COLLECTION: kernels}

    def decode(latent: Float[Array, "h w C"]) -> Float[Array, "H W 3"]:
        latents = latent[None] / config.vae.scaling_factor
        return config.vae_model.apply(vae, latents, method="decode")[0].astype(jnp.float32)

    pictures = jax.lax.map(decode, latents, batch_size=max(1, _DECODED_PIXELS // pixels))
    pictures = jnp.clip(pictures / 2 + 0.5, 0, 1)
    if config.safety is None:
        return pictures, jnp.zeros(len(pictures), bool)
    flagged = flag_pictures(config.safety, bundle.params["safety_checker"], pictures)
    return jnp.where(flagged[:, None, None, None], 0, pictures), flagged


def check_finite(pictures: Float[Array | np.ndarray, "N H W 3"], dtype: str) -> None:
    """On the host.

    Raises:
        InputError: a picture is none.
    """
    if not np.isfinite(np.asarray(pictures)).all():
        raise InputError(NOT_FINITE.format(dtype=dtype))


def to_uint8(pictures: Float[Array, "N H W 3"]) -> np.ndarray:
    """Pictures in [0, 1] as 8-bit arrays on the host."""
    return np.round(np.asarray(pictures) * 255).astype(np.uint8)
