"""The UNet stage: v-prediction on stored latents under stored text states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from embedded.training import Tree, arithmetic
from sdipc_jax.checkpoints.bundle import apply
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
    """The UNet and its loss.

    Attributes:
        length: of the context.
        blur: how far the end's state that is told alone is moved at most, as a share of its length.
    """

    config: UNetConfig
    length: int
    blur: float
    snr_limit: float = 5.0

    def init(self, key: Array) -> Tree:
        side, width = self.config.sample_size, self.config.cross_attention_dim
        latents, context = jnp.zeros((1, side, side, self.config.in_channels)), jnp.zeros((1, self.length, width))
        params = jax.jit(UNet2DConditionModel(self.config).init)(key, latents, jnp.zeros(1), context)["params"]
        # A prediction of 0 to begin with is a better start than a random one.
        params["conv_out"]["kernel"] = jnp.zeros_like(params["conv_out"]["kernel"])
        return params

    def loss(self, params: Tree, data: Tree, batch: Tree, key: Array) -> tuple[Float[Array, ""], Tree]:
        """Squared error of v (Salimans and Ho 2022), weighted by min-SNR (Hang et al. 2023, section 3.4).

        Args:
            data: `mean` and `deviation` of scaled latents, plain and mirrored, (2, N, h, w, C); `states` of texts and
                the places of their `end`.
            batch: `rows` of the latents, whether `mirrored`, row of the `text`, and whether its `end_alone` is told, at
                every place but the first: a prompt made of a picture has nothing else, and what a UNet that has seen
                few captions does not need to read in training it does not read at all. Nor has it seen what lies
                between them, which is where pictures are: such a state is moved by a random share of `blur` along the
                difference of two other captions.
        """
        keys = jax.random.split(key, 4)
        mean, deviation = (
            data[name][batch["mirrored"], batch["rows"]].astype(jnp.float32) for name in ("mean", "deviation")
        )
        latents = mean + deviation * jax.random.normal(keys[0], mean.shape)
        # One timestep from each of N equal parts of the range: less varied losses than N free draws.
        count = len(mean)
        share = (jnp.arange(count) + jax.random.uniform(keys[1], (count,))) / count
        alphas = jnp.asarray(alphas_cumprod(), jnp.float32)
        timesteps = jnp.minimum((share * len(alphas)).astype(jnp.int32), len(alphas) - 1)
        alpha = alphas[timesteps][:, None, None, None]
        noise = jax.random.normal(keys[2], mean.shape)
        noisy = jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise
        wanted = jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * latents
        states, end = data["states"][batch["text"]].astype(jnp.float32), data["end"][batch["text"]]
        at_end = jnp.take_along_axis(states, end[:, None, None], axis=1)
        at_end = moved(at_end, self.blur * jax.random.uniform(keys[3], (count, 1, 1)))
        told = batch["end_alone"][:, None] & (jnp.arange(self.length) > 0)
        context = jnp.where(told[..., None], at_end, states)
        unet = UNet2DConditionModel(self.config, arithmetic())
        found = apply(unet, params, noisy, timesteps.astype(jnp.float32), context).astype(jnp.float32)
        error = jnp.mean(jnp.square(found - wanted), axis=(1, 2, 3))
        ratio = alpha[:, 0, 0, 0] / (1 - alpha[:, 0, 0, 0])
        weighted = jnp.mean(jnp.minimum(ratio, self.snr_limit) / (ratio + 1) * error)
        early = count * 3 // 4
        return weighted, {"loss": weighted, "v_error": jnp.mean(error), "v_error_noisiest": jnp.mean(error[early:])}


def moved(states: Float[Array, "N 1 D"], share: Float[Array, "N 1 1"]) -> Float[Array, "N 1 D"]:
    """States moved by a share of their length along the difference of two others, and as long as before."""

    def length(rows: Array) -> Array:
        return jnp.linalg.norm(rows, axis=-1, keepdims=True)

    # Rows come in pairs of a thing; two others can be one text.
    apart = jnp.roll(states, 2, axis=0) - jnp.roll(states, 5, axis=0)
    further = states + share * length(states) * apart / jnp.maximum(length(apart), 1e-6)
    return length(states) * further / length(further)
