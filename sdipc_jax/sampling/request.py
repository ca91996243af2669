"""What is asked of the sampler: checked, completed by the checkpoint's defaults, and made the loop's first state."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sdipc_jax.checkpoints.bundle import Bundle, Config, Params
from sdipc_jax.errors import InputError
from sdipc_jax.executables import kept_program
from sdipc_jax.models import winograd
from sdipc_jax.models.weighted import MutedTokens, cross_attention_layers
from sdipc_jax.prompts.contexts import as_long, negative_prompt
from sdipc_jax.prompts.prompt import AnyPrompt, check_prompt, unet_inputs
from sdipc_jax.samplers import SAMPLERS, chosen_sampler
from sdipc_jax.sampling.control import Conditioning, Control, condition
from sdipc_jax.sampling.noise import draw_noise, keys_of
from sdipc_jax.sampling.rows import FINITE, SHARE, WHOLE, on_host, rows
from sdipc_jax.sampling.start import Repainting, Start, first_evaluation, started
from sdipc_jax.sampling.weights import weighted
from sdipc_jax.settings import BOTH_INTERVALS, FAST, Defaults, SamplerSettings
from sdipc_jax.tracing import under_our_rules


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "schedule",
        "context",
        "added",
        "weights",
        "keys",
        "guidance_scale",
        "guided",
        "cache_interval",
        "eta",
        "winograd",
        "repainting",
        "controls",
    ],
    meta_fields=["sampler"],
)
@dataclass(frozen=True)
class Request:
    """All that the loop reads and never changes. Only the sampler's name is static.

    Attributes:
        schedule: the sampler's arrays, one entry an evaluation of the UNet.
        context: the negative prompts, then the prompts, (2N, L, D); the prompts alone, (N, L, D), without guidance. R
            prompts for each picture are (2N, R, L, D).
        added: what SDXL's UNet reads besides, by name and in the same rows: pooled texts, of R prompts (2N, R, P), and
            sizes.
        weights: of R prompts in each layer, evaluation and place, (2N, R, layers, evaluations, h, w) or with axes of 1;
            None where there is one.
        keys: one key a picture, (N,).
        guidance_scale: one a picture, (N, 1, 1, 1).
        guided: at which evaluations guidance acts, (evaluations,); None if at all of them.
        cache_interval: the whole UNet runs at every so many evaluations, (); None if at all of them.
        eta: the share of fresh noise in DDIM, ().
        winograd: kernels of the UNet in another form, for CPUs (`models.winograd.transformed`).
        repainting: what keeps a picture where its mask is 0; None without a mask.
        controls: what each of the bundle's ControlNets sees, and when.
    """

    schedule: Any
    context: Float[Array, "M L D"] | Float[Array, "M R L D"] | MutedTokens
    added: dict[str, Any]
    weights: Float[Array, "M R _ _ _ _"] | None
    keys: Key[Array, " N"]
    guidance_scale: Float[Array, "N 1 1 1"]
    guided: Bool[Array, " evaluations"] | None
    cache_interval: Int[Array, ""] | None
    eta: Float[Array, ""]
    winograd: Params
    repainting: Repainting | None
    controls: tuple[Conditioning, ...]
    sampler: str

    @property
    def evaluations(self) -> int:
        """How often the UNet runs; PNDM runs it once more than it has steps."""
        return self.schedule.timesteps.shape[0]


# What goes from piece to piece of the loop: latents (N, h, w, C), and the history of a multistep sampler.
State = tuple[Float[Array, "N h w C"], Any]


@under_our_rules
def begin(
    bundle: Bundle,
    context: AnyPrompt | Float[Array, "N R L D"],
    *,
    weights: Float[Array | np.ndarray, "#N R ..."] | None = None,
    negative: AnyPrompt | None = None,
    seeds: Any = None,
    indices: Any = 0,
    latents: Float[Array, "N C h w"] | None = None,
    start: Start | None = None,
    controls: Sequence[Control] = (),
    kept: Float[Array | np.ndarray, "#N *R L"] | None = None,
    steps: int | None = None,
    guidance_scale: Any = None,
    guidance_interval: tuple[float, float] | None = None,
    cache_interval: int | None = None,
    sampler: str | None = None,
    eta: Any = 0.0,
    height: int | None = None,
    width: int | None = None,
    karras: bool = False,
) -> tuple[Request, State]:
    """The loop's inputs and its first state. See `sample.generate`."""
    config, defaults = bundle.config, bundle.config.defaults
    name = chosen_sampler(config.scheduler, defaults.sampler if sampler is None else sampler)
    height, width = defaults.height if height is None else height, defaults.width if width is None else width
    shape = config.latent_shape(height, width)
    check_prompt("context", context, most=4)
    check_prompt("negative", negative)
    count = len(context)
    if count == 0:
        raise InputError("there are no prompts, expected at least one: ask for a picture")
    negative = negative_prompt(bundle) if negative is None else negative
    sizes = np.array([height, width, 0, 0, height, width], np.float32)
    context, added = unet_inputs(config, "context", context, count, sizes)
    negative, negative_added = unet_inputs(config, "negative", negative, count, added.get("time_ids", sizes))
    context, negative = as_long(context, negative, config.tokens.length)
    length = context.shape[-2] if context.shape[-2] % config.tokens.length == 0 else config.tokens.length
    prompt_shape = (length, config.unet.cross_attention_dim)
    several = context.ndim == 4
    for what, prompts, expected in (
        ("context", context, (count, *context.shape[1:2], *prompt_shape) if several else (count, *prompt_shape)),
        ("negative", negative, (count, *prompt_shape)),
    ):
        if prompts.shape[1:] != expected[1:] or prompts.shape[0] not in (1, count):
            raise InputError(f"{what} has shape {prompts.shape}, expected {expected}")
    if seeds is None and latents is None:
        raise InputError("there are neither seeds nor latents, expected one of them: give seeds=0 or another number")
    if latents is not None and latents.shape != (count, *shape):
        raise InputError(f"latents have shape {latents.shape}, expected {(count, *shape)}")
    if start is not None and start.latents.shape != (count, *shape[1:], shape[0]):
        raise InputError(
            f"the pictures to start from have latents {start.latents.shape}, expected {(count, *shape[1:], shape[0])}"
        )
    if start is None and config.unet.repaints:
        raise InputError(
            "this UNet was trained to repaint a part of a picture: give a picture and a mask to start with"
        )
    steps = defaults.steps if steps is None else steps
    first = 0 if start is None else first_evaluation(start.strength, steps)
    schedule = SAMPLERS[name].schedule(config.scheduler, steps, karras=karras, first=first)

    guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    keys = keys_of(rows("seeds", 0 if seeds is None else seeds, count, WHOLE), rows("indices", indices, count, WHOLE))
    noise = draw_noise(keys, shape) if latents is None else latents.astype(jnp.float32)
    noise, repainting = noise.transpose(0, 2, 3, 1), None
    if start is None:
        x = noise * schedule.init_noise_sigma
    else:
        x, repainting = started(start, noise, schedule.levels, schedule.init_noise_sigma)
    if repainting is None:
        schedule = schedule._replace(levels=None)
    guidance = rows("guidance_scale", guidance_scale, count, FINITE)[:, None, None, None]
    interval, cached = choose_intervals(defaults, guidance_interval, cache_interval)
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise InputError(
            f"guidance_interval is {interval!r}, expected two shares of the timesteps, the lower one first"
        )
    context, weights = weighted(context, weights, (len(cross_attention_layers(config.unet)), len(schedule.timesteps)))
    if weights is None:
        # One prompt for each picture, whose pooled vector may stand in an axis of its own, as it did.
        added = {name: array.reshape(count, array.shape[-1]) for name, array in added.items()}
    guided = None
    if config.unet.embeds_guidance or _unguided(guidance_scale):
        prompts = context
    else:
        if weights is not None:
            # The negative prompt stands in each of the R places, so that any weights with a sum of 1 leave it as it is.
            negative = negative[:, None]
            weights = jnp.concatenate([jnp.full_like(weights, 1 / context.shape[1]), weights])
        prompts = jnp.concatenate([jnp.broadcast_to(negative, context.shape), context])
        added = {name: jnp.concatenate([_like(negative_added[name], array), array]) for name, array in added.items()}
        if interval is not None:
            share = np.asarray(schedule.timesteps) / config.scheduler.num_train_timesteps
            guided = jnp.asarray((interval[0] <= share) & (share <= interval[1]))
    request = Request(
        schedule=jax.tree.map(jnp.asarray, schedule),
        context=_muted(prompts.astype(config.compute_dtype), kept, count),
        added=added,
        weights=weights,
        keys=keys,
        guidance_scale=guidance,
        guided=guided,
        cache_interval=jnp.asarray(cached) if cached > 1 else None,
        eta=rows("eta", eta, 1, SHARE)[0],
        winograd=winograd_kernels(bundle, *shape[1:]),
        repainting=repainting,
        controls=condition(bundle, controls, count, len(schedule.timesteps), (height, width)),
        sampler=name,
    )
    return request, (x, SAMPLERS[name].init(x))


def _like(rows: Float[Array, "N P"], others: Float[Array, "N *R P"]) -> Float[Array, "N *R P"]:
    """Rows that stand in each of R places, where others do."""
    return jnp.broadcast_to(rows.reshape(len(rows), *(1,) * (others.ndim - 2), rows.shape[-1]), others.shape)


def _muted(prompts: Float[Array, "M *R L D"], kept: Any, count: int) -> Float[Array, "M *R L D"] | MutedTokens:
    """Prompts whose tokens' attention counts so much, for the last rows, those that are no negative prompts."""
    if kept is None:
        return prompts
    kept = jnp.asarray(kept, jnp.float32)
    kept = kept[:, None] if kept.ndim < prompts.ndim - 1 else kept
    expected = (count, *prompts.shape[1:-1])
    fits = all(found in (1, size) for found, size in zip(kept.shape, expected, strict=False))
    if kept.ndim != len(expected) or not fits or kept.shape[-1] != expected[-1]:
        raise InputError(f"kept has shape {kept.shape}, expected {expected}: how much of each token's attention counts")
    rows = jnp.ones(prompts.shape[:-1]).at[-count:].set(jnp.broadcast_to(kept, expected))
    return MutedTokens(prompts, rows)


def decide(config: Config, settings: SamplerSettings) -> Defaults:
    """What is typed, and where nothing is, what `fast` stands for and what the checkpoint asks for.

    Raises:
        InputError: the sampler does not take these steps, or is the scheduler's and not built, or both intervals are
            asked for.
    """
    chosen = {name: getattr(settings, name, None) for name in Defaults.model_fields}
    defaults = config.defaults.model_copy(update=FAST if settings.fast else {})
    values = defaults.model_copy(update={name: value for name, value in chosen.items() if value is not None})
    sampler = chosen_sampler(config.scheduler, values.sampler)
    SAMPLERS[sampler].schedule(config.scheduler, values.steps, karras=settings.karras)
    guidance, cached = choose_intervals(defaults, settings.guidance_interval, settings.cache_interval)
    return values.model_copy(update={"sampler": sampler, "guidance_interval": guidance, "cache_interval": cached})


def choose_intervals(
    defaults: Defaults, guidance_interval: tuple[float, float] | None, cache_interval: int | None
) -> tuple[tuple[float, float] | None, int]:
    """The two intervals of `generate`, of which one at most leaves work away: what is asked for, else the checkpoint's.

    Raises:
        InputError: both are asked for, or a `cache_interval` that is no whole number from 1.
    """
    try:
        asked = 1 if cache_interval is None else operator.index(cache_interval)
    except TypeError:
        asked = 0
    if asked < 1:
        raise InputError(f"cache_interval is {cache_interval!r}, expected a whole number from 1: choose another")
    if guidance_interval is not None and asked > 1:
        raise InputError(BOTH_INTERVALS)
    if guidance_interval is not None or asked > 1:
        return guidance_interval, asked
    return defaults.guidance_interval, defaults.cache_interval if cache_interval is None else asked


@kept_program(static_argnums=(1, 2))
def winograd_kernels(bundle: Bundle, height: int, width: int) -> Params:
    """The UNet's kernels in Winograd's form, for latents of this size."""
    config = bundle.config
    sample = jnp.zeros((1, height, width, config.unet.in_channels))
    context = jnp.zeros((1, 1, config.unet.cross_attention_dim))
    added: dict[str, Any] = {name: jnp.zeros(shape.shape) for name, shape in config.added_inputs(1).items()}
    return winograd.transformed(config.unet_model, bundle.params["unet"], sample, jnp.zeros(1), context, **added)


def _unguided(guidance_scale: Any) -> bool:
    """Whether no picture is guided, as far as the host knows without asking a device."""
    return on_host(guidance_scale) and bool(np.all(np.asarray(guidance_scale) <= 1))
