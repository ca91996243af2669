"""The UNet stage: v-prediction on stored latents under stored text states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from embedded.training import Tree
from sdipc_jax.bundle import apply
from sdipc_jax.models import UNet2DConditionModel, UNetConfig

SCHEDULER: Tree = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def alphas_cumprod() -> Float[np.ndarray, " T"]:
    """The share of signal at each training timestep, in float64."""
    first, last = SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5
    return np.cumprod(1 - np.linspace(first, last, SCHEDULER["num_train_timesteps"]) ** 2)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The UNet and its loss."""

    config: UNetConfig
    length: int
    snr_limit: float = 5.0

    def init(self, key: Array) -> Tree:
        side, width = self.config.sample_size, self.config.cross_attention_dim
        latents, context = jnp.zeros((1, side, side, self.config.in_channels)), jnp.zeros((1, self.length, width))
        params = UNet2DConditionModel(self.config).init(key, latents, jnp.zeros(1), context)["params"]
        # A prediction of 0 to begin with is a better start than a random one.
        params["conv_out"]["kernel"] = jnp.zeros_like(params["conv_out"]["kernel"])
        return params

    def loss(self, params: Tree, batch: Tree, key: Array) -> tuple[Float[Array, ""], Tree]:
        """Squared error of v (Salimans and Ho 2022), weighted by min-SNR (Hang et al. 2023, section 3.4).

        Args:
            batch: `mean` and `deviation` of scaled latents and the text states `context`.
        """
        keys = jax.random.split(key, 3)
        mean = batch["mean"].astype(jnp.float32)
        latents = mean + batch["deviation"].astype(jnp.float32) * jax.random.normal(keys[0], mean.shape)
        # One timestep from each of N equal parts of the range: less varied losses than N free draws.
        count = len(mean)
        share = (jnp.arange(count) + jax.random.uniform(keys[1], (count,))) / count
        alphas = jnp.asarray(alphas_cumprod(), jnp.float32)
        timesteps = jnp.minimum((share * len(alphas)).astype(jnp.int32), len(alphas) - 1)
        alpha = alphas[timesteps][:, None, None, None]
        noise = jax.random.normal(keys[2], mean.shape)
        noisy = jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise
        wanted = jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * latents
        context = batch["context"].astype(jnp.float32)
        found = apply(UNet2DConditionModel(self.config), params, noisy, timesteps.astype(jnp.float32), context)
        error = jnp.mean(jnp.square(found - wanted), axis=(1, 2, 3))
        ratio = alpha[:, 0, 0, 0] / (1 - alpha[:, 0, 0, 0])
        weighted = jnp.mean(jnp.minimum(ratio, self.snr_limit) / (ratio + 1) * error)
        early = count * 3 // 4
        return weighted, {"loss": weighted, "v_error": jnp.mean(error), "v_error_noisiest": jnp.mean(error[early:])}
