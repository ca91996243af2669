"""Eq. 9 of arXiv 2305.12716: the diffusion loss under pictures as prompts, plus the ordinary one under captions."""

from collections.abc import Callable
from typing import Any, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdipc_jax.checkpoints.bundle import Params, apply
from sdipc_jax.errors import InputError
from sdipc_jax.prompts.contexts import after_start
from sdipc_jax.prompts.projection import convert
from sdipc_jax.prompts.prompt import AnyPrompt, unet_inputs
from sdipc_jax.tracing import under_our_rules
from sdipc_jax.tuning.settings import TuningSettings
from sdipc_jax.tuning.trainable import Frozen, merge, trained_projection


class Batch(TypedDict):
    """Reference pictures, and the target pictures that they are to bring forth: the same ones, or others (A/B).

    `latents` are the targets' in the UNet's scale, channels last, or their mean where `deviation` is there too.
    References come as `pixels` where deep prompts train, else as `features`, which is what `encode_images` gives.
    `text` are the prompts of the targets' captions, needed where `text_weight` is not 0. `rows` number the pictures of
    an update: noise, timestep and dropout of a picture depend on the key and on its number alone, so that it does not
    matter how an update's pictures are divided into batches and devices. By default they count from 0.
    """

    latents: Float[Array | np.ndarray, "N h w C"]
    deviation: NotRequired[Float[Array | np.ndarray, "N h w C"]]
    pixels: NotRequired[Float[Array | np.ndarray, "N S S 3"]]
    features: NotRequired[Float[Array | np.ndarray, "N D_image"]]
    text: NotRequired[AnyPrompt]
    rows: NotRequired[Int[Array | np.ndarray, " N"]]


class Draws(NamedTuple):
    """What is random in a step.

    Attributes:
        timesteps: uniform over all, (N,).
        noise: that the UNet is to find, (N, h, w, C).
        latent_noise: that the latents are drawn with, (N, h, w, C).
        keep: the dropout of the deep prompts, 0 or 1 / (1 - rate), (N, layers, P, D); None without.
    """

    timesteps: Int[Array, " N"]
    noise: Float[Array, "N h w C"]
    latent_noise: Float[Array, "N h w C"]
    keep: Float[Array, "N layers P D"] | None


@under_our_rules
def draw(key: Key[Array, ""], rows: Int[Array, " N"], frozen: Frozen, settings: TuningSettings, batch: Batch) -> Draws:
    """The random numbers of the pictures with these numbers."""
    steps, shape = len(frozen.alpha_bars), batch["latents"].shape[1:]
    vision, prompts = frozen.config.vision_side.vision, frozen.config.vision_side.prompts
    drops = settings.trains_prompts and prompts is not None and settings.dropout > 0

    def one(row: Int[Array, ""]) -> Draws:
        keys = jax.random.split(jax.random.fold_in(key, row), 4)
        keep = None
        if drops and prompts is not None:
            kept = 1 - settings.dropout
            shape_of_prompts = (vision.num_hidden_layers, prompts.length, vision.hidden_size)
            keep = jax.random.bernoulli(keys[3], kept, shape_of_prompts) / kept
        return Draws(
            timesteps=jax.random.randint(keys[0], (), 0, steps),
            noise=jax.random.normal(keys[1], shape, jnp.float32),
            latent_noise=jax.random.normal(keys[2], shape, jnp.float32),
            keep=keep,
        )

    return jax.vmap(one)(rows)


def loss(
    trained: Params, frozen: Frozen, settings: TuningSettings, batch: Batch, draws: Draws
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Eq. 9: L_cnvrt + text_weight L_text, each a mean over all numbers, and both by name.

    The two share target, timestep and noise, and with a weight of 0 the second is not computed.
    """
    params = merge(trained, frozen.params)
    prompts = [image_context(params, frozen, settings, batch, draws)]
    if settings.text_weight > 0:
        prompts.append(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch["text"]))
    latents = jnp.asarray(batch["latents"], jnp.float32)
    if "deviation" in batch:
        latents = latents + jnp.asarray(batch["deviation"], jnp.float32) * draws.latent_noise
    alpha_bar = frozen.alpha_bars[draws.timesteps][:, None, None, None]
    signal, share = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    noisy = signal * latents + share * draws.noise
    # Salimans and Ho 2022, section 4: v = alpha epsilon - sigma x.
    wanted = draws.noise if frozen.prediction_type == "epsilon" else signal * draws.noise - share * latents

    def tiled(array: Array) -> Array:
        return jnp.concatenate([array] * len(prompts))

    timesteps, noisy = tiled(draws.timesteps.astype(jnp.float32)), tiled(noisy)
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *prompts)
    # What SDXL is told of sizes: the target's own, not cropped, as in sampling.
    height, width = (frozen.config.vae.downscale * side for side in latents.shape[1:3])
    sizes = np.array([height, width, 0, 0, height, width], np.float32)
    context, added = unet_inputs(frozen.config, "the batch's prompt", both, len(prompts) * len(latents), sizes)
    found = apply(frozen.config.unet_model, params["unet"], noisy, timesteps, context, **added)
    errors = jnp.square(found.astype(jnp.float32) - tiled(wanted)).reshape(len(prompts), -1).mean(axis=1)
    total = errors[0]
    parts = {"loss_image": errors[0]}
    if settings.text_weight > 0:
        total = total + settings.text_weight * errors[1]
        parts["loss_text"] = errors[1]
    return total, parts


def objective(settings: TuningSettings) -> Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]:
    """`loss`, or with `rematerialise` a `loss` whose gradient takes a tenth of the memory and more time."""
    return jax.checkpoint(loss, static_argnums=2, policy=_kept) if settings.rematerialise else loss


def image_context(params: Params, frozen: Frozen, settings: TuningSettings, batch: Batch, draws: Draws) -> AnyPrompt:
    """c_img of eq. 9: vision tower with deep prompts, eq. 6 or a fitted map, then eq. 7's prompt."""
    if settings.trains_prompts:
        clip = {name: params["clip"][name] for name in ("vision_model", "deep_prompts")}
        features = apply(frozen.config.vision_model, clip, jnp.asarray(batch["pixels"]), draws.keep)
    else:
        features = jnp.asarray(batch["features"])
    vectors = convert(trained_projection(frozen.projection, params, settings), features)
    return after_start(frozen.config, frozen.start, vectors)


def check_batch(batch: Batch, settings: TuningSettings) -> None:
    """Refuses a batch that lacks what the settings need.

    Raises:
        InputError: with the name of what is missing.
    """
    references = "pixels" if settings.trains_prompts else "features"
    needed = ["latents", references] + (["text"] if settings.text_weight > 0 else [])
    for name in needed:
        if name not in batch:
            raise InputError(
                f"the batch has {', '.join(batch)} but no {name}, which variant {settings.variant} and text_weight "
                f"{settings.text_weight:g} need: make it with tuning.make_cache"
            )
    counts = {name: len(value) for name, value in batch.items()}  # type: ignore[arg-type]
    if len(set(counts.values())) > 1:
        raise InputError(f"the batch has different numbers of pictures, {counts}: expected one row a picture in each")


def _kept(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """What rematerialisation keeps: results of convolutions and linear layers, but not attention's, which are large."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **parameters)
