"""From prompts to pictures: noise, the guided loop over the steps, decoding.

`begin`, `advance` and `finish` are compiled on their own, so that a progress bar that goes through the steps in
pieces runs the very program that `generate` runs in one go.
"""

import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sdipc_jax.checkpoints.bundle import Bundle, Params
from sdipc_jax.errors import InputError
from sdipc_jax.models import winograd
from sdipc_jax.prompts.contexts import empty_prompt
from sdipc_jax.safety import flag_pictures
from sdipc_jax.samplers import SAMPLERS
from sdipc_jax.settings import BOTH_INTERVALS, Defaults
from sdipc_jax.tracing import varying_axes

# The largest batch that the VAE decodes at once, in pixels: its activations are what takes most memory.
_DECODED_PIXELS = 512 * 512
_SECONDS_BETWEEN_REPORTS = 1.0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["schedule", "context", "keys", "guidance_scale", "guided", "cache_interval", "eta", "winograd"],
    meta_fields=["sampler"],
)
@dataclass(frozen=True)
class Request:
    """All that the loop reads and never changes. Only the sampler's name is static.

    Attributes:
        schedule: the sampler's arrays, one entry an evaluation of the UNet.
        context: the negative prompts, then the prompts, (2N, L, D); the prompts alone, (N, L, D), without guidance.
        keys: one key a picture, (N,).
        guidance_scale: one a picture, (N, 1, 1, 1).
        guided: at which evaluations guidance acts, (evaluations,); None if at all of them.
        cache_interval: the whole UNet runs at every so many evaluations, (); None if at all of them.
        eta: the share of fresh noise in DDIM, ().
        winograd: kernels of the UNet in another form, for CPUs (`models.winograd.transformed`).
    """

    schedule: Any
    context: Float[Array, "M L D"]
    keys: Key[Array, " N"]
    guidance_scale: Float[Array, "N 1 1 1"]
    guided: Bool[Array, " evaluations"] | None
    cache_interval: Int[Array, ""] | None
    eta: Float[Array, ""]
    winograd: Params
    sampler: str

    @property
    def evaluations(self) -> int:
        """How often the UNet runs; PNDM runs it once more than it has steps."""
        return self.schedule.timesteps.shape[0]


# What goes from piece to piece of the loop: latents (N, h, w, C), and the history of a multistep sampler.
State = tuple[Float[Array, "N h w C"], Any]


def generate(
    bundle: Bundle,
    context: Float[Array, "N L D"],
    *,
    negative: Float[Array, "*N L D"] | None = None,
    seeds: Any,
    indices: Any = 0,
    latents: Float[Array, "N C h w"] | None = None,
    steps: int | None = None,
    guidance_scale: Any = None,
    guidance_interval: tuple[float, float] | None = None,
    cache_interval: int | None = None,
    sampler: str | None = None,
    eta: Any = 0.0,
    height: int | None = None,
    width: int | None = None,
    karras: bool = False,
) -> Float[Array, "N H W 3"]:
    """Samples one picture a prompt.

    Works under `jit`, `vmap`, `shard_map` and `pmap`. New values of seeds, guidance, eta, prompts and latents compile
    nothing; shapes, `steps` and `sampler` are static, and so is whether there is guidance, and either interval.

    Args:
        context: prompts, as `image_prompt`, `edit_prompt` and `text_prompt` give them.
        negative: what guidance leads away from, (N, L, D) or (1, L, D); the empty text if None.
        seeds: 0 to 2^32 - 1, one a picture or one for all.
        indices: numbers the variations of a seed. Picture n depends on `fold_in(key(seeds[n]), indices[n])` alone,
            not on its batch.
        latents: noise of unit variance to start from, instead of the seed's.
        steps, guidance_scale, sampler, height, width: the checkpoint's defaults if None. Guidance of 1 or less is
            no guidance, as in diffusers; where the host knows that of all pictures, another program runs, which
            leaves the negative half of the work away.
        guidance_interval: the lowest and the highest timestep at which guidance acts, as shares of the timesteps of
            training, 0 to 1; at the others the negative half of the work is left away (Kynkaanniemi et al. 2024, who
            count in noise levels).
        cache_interval: at every so many evaluations the whole UNet runs; at the others its first and last layers do,
            on the deep features of the last whole run (Ma et al. 2024, DeepCache); 1 is all of it, always. Where
            neither interval is given, the checkpoint's own counts, and if it has none nothing is left away.
        eta: DDIM's share of fresh noise, 0 to 1 (Song et al. 2021, eq. 16); other samplers ignore it.
        karras: Karras et al.'s noise levels, for `dpm++2m`.

    Returns:
        Pictures in [0, 1], float32. One that the checkpoint's safety checker flags is black.

    Raises:
        InputError: an unknown sampler, steps out of range, sides that are no multiple of f, latents or prompts of
            another shape, no prompts, an interval that is none, both intervals, and on the host: seeds, indices,
            guidance or eta out of range. (Values on a device are taken as they are: to look at them would be to wait
            for them.)
    """
    request, state = begin(
        bundle,
        context,
        negative=negative,
        seeds=seeds,
        indices=indices,
        latents=latents,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        cache_interval=cache_interval,
        sampler=sampler,
        eta=eta,
        height=height,
        width=width,
        karras=karras,
    )
    state = advance(bundle, request, state, 0, request.evaluations)
    # Decoding needs the memory that the UNet's other kernels have.
    del request
    return finish(bundle, state)[0]


def generate_with_progress(
    bundle: Bundle, context: Float[Array, "N L D"], report: Callable[[int, int], None], **settings: Any
) -> tuple[Float[Array, "N H W 3"], Bool[Array, " N"]]:
    """`generate` in pieces of about a second, on the host.

    Args:
        report: called with the evaluations done and their total after every piece.
        settings: as for `generate`.

    Returns:
        The pictures, bit for bit those of `generate`, and which of them the safety checker flagged.
    """
    request, state = begin(bundle, context, **settings)
    state = in_pieces(partial(advance, bundle, request), request, state, report)
    del request  # As in `generate`.
    return finish(bundle, state)


def in_pieces(
    advance: Callable[[State, int, int], State],
    request: Request,
    state: State,
    report: Callable[[int, int], None],
    piece: int | None = None,
) -> State:
    """All evaluations of the loop, in pieces of so many, or of about a second.

    Pieces end where the whole UNet runs next: deep features do not leave the loop.
    """
    total = request.evaluations
    step = 1 if request.cache_interval is None else int(request.cache_interval)
    done, size = 0, piece or 1
    while done < total:
        last = min(done + step * ceil(size / step), total)
        started = time.perf_counter()
        state = jax.block_until_ready(advance(state, done, last))
        if piece is None:
            # The first piece may have compiled, so it only sets the pace for the second.
            size = max(1, int(_SECONDS_BETWEEN_REPORTS * (last - done) / (time.perf_counter() - started)))
        done = last
        report(done, total)
    return state


def begin(
    bundle: Bundle,
    context: Float[Array, "N L D"],
    *,
    negative: Float[Array, "*N L D"] | None = None,
    seeds: Any,
    indices: Any = 0,
    latents: Float[Array, "N C h w"] | None = None,
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
    """The loop's inputs and its first state. See `generate`."""
    config, defaults = bundle.config, bundle.config.defaults
    name = defaults.sampler if sampler is None else sampler
    if name not in SAMPLERS:
        raise InputError(f"sampler is {name!r}, expected one of {', '.join(SAMPLERS)}")
    shape = config.latent_shape(
        defaults.height if height is None else height, defaults.width if width is None else width
    )
    count = context.shape[0]
    if count == 0:
        raise InputError("there are no prompts, expected at least one: ask for a picture")
    prompt_shape = (config.tokens.length, config.unet.cross_attention_dim)
    negative = empty_prompt(bundle) if negative is None else negative
    for what, prompts in (("context", context), ("negative", negative)):
        if prompts.shape[1:] != prompt_shape or prompts.shape[0] not in (1, count):
            raise InputError(f"{what} has shape {prompts.shape}, expected {(count, *prompt_shape)}")
    if latents is not None and latents.shape != (count, *shape):
        raise InputError(f"latents have shape {latents.shape}, expected {(count, *shape)}")
    schedule = SAMPLERS[name].schedule(config.scheduler, defaults.steps if steps is None else steps, karras=karras)

    guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    keys = _keys(_rows("seeds", seeds, count, _WHOLE), _rows("indices", indices, count, _WHOLE))
    noise = _noise(keys, shape) if latents is None else latents.astype(jnp.float32)
    x = noise.transpose(0, 2, 3, 1) * schedule.init_noise_sigma
    guidance = _rows("guidance_scale", guidance_scale, count, _FINITE)[:, None, None, None]
    interval, cached = choose_intervals(defaults, guidance_interval, cache_interval)
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise InputError(
            f"guidance_interval is {interval!r}, expected two shares of the timesteps, the lower one first"
        )
    guided = None
    if _unguided(guidance_scale):
        prompts = context
    else:
        prompts = jnp.concatenate([jnp.broadcast_to(negative, context.shape), context])
        if interval is not None:
            share = np.asarray(schedule.timesteps) / config.scheduler.num_train_timesteps
            guided = jnp.asarray((interval[0] <= share) & (share <= interval[1]))
    request = Request(
        schedule=jax.tree.map(jnp.asarray, schedule),
        context=prompts.astype(config.compute_dtype),
        keys=keys,
        guidance_scale=guidance,
        guided=guided,
        cache_interval=jnp.asarray(cached) if cached > 1 else None,
        eta=_rows("eta", eta, 1, _SHARE)[0],
        winograd=winograd_kernels(bundle, *shape[1:]),
        sampler=name,
    )
    return request, (x, SAMPLERS[name].init(x))


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


@partial(jax.jit, static_argnums=(1, 2))
def winograd_kernels(bundle: Bundle, height: int, width: int) -> Params:
    """The UNet's kernels in Winograd's form, for latents of this size."""
    config = bundle.config
    sample = jnp.zeros((1, height, width, config.unet.in_channels))
    context = jnp.zeros((1, 1, config.unet.cross_attention_dim))
    return winograd.transformed(config.unet_model, bundle.params["unet"], sample, jnp.zeros(1), context)


@jax.jit
def advance(bundle: Bundle, request: Request, state: State, first: Any, last: Any) -> State:
    """Evaluations `first` to `last` (excluded) of the loop. The bounds are traced: one program for any piece.

    Where the whole UNet does not always run, it runs at `first` in any case.
    """
    config, sampler = bundle.config, SAMPLERS[request.sampler]
    state = _varying(state, like=(bundle, request))
    schedule, guidance = request.schedule, request.guidance_scale
    count = state[0].shape[0]

    def predict(i: Array, x: Array, context: Array, *deep: Array, with_deep: bool = False) -> Any:
        scaled = (schedule.input_scale[i] * x).astype(config.compute_dtype)
        inputs = jnp.concatenate([scaled] * (len(context) // count))
        timesteps = jnp.full(len(inputs), schedule.timesteps[i])
        unet = {"params": bundle.params["unet"], winograd.COLLECTION: request.winograd}
        return config.unet_model.apply(unet, inputs, timesteps, context, *deep, with_deep=with_deep)

    def guide(prediction: Float[Array, "M h w C"]) -> Float[Array, "N h w C"]:
        prediction = prediction.astype(jnp.float32)
        if len(prediction) == count:
            return prediction
        unconditional, conditional = jnp.split(prediction, 2)
        return jnp.where(guidance > 1, unconditional + guidance * (conditional - unconditional), conditional)

    def everywhere(i: Array, x: Array) -> Float[Array, "N h w C"]:
        return guide(predict(i, x, request.context))

    def unguided(i: Array, x: Array) -> Float[Array, "N h w C"]:
        return guide(predict(i, x, request.context[-count:]))

    def whole(i: Array, x: Array, _: Any) -> tuple[Float[Array, "N h w C"], Float[Array, "M h w C_0"]]:
        prediction, deep = predict(i, x, request.context, with_deep=True)
        return guide(prediction), deep

    def shallow(i: Array, x: Array, deep: Array) -> tuple[Float[Array, "N h w C"], Float[Array, "M h w C_0"]]:
        return guide(predict(i, x, request.context, deep)), deep

    def evaluate(i: Array, carried: tuple[State, Any]) -> tuple[State, Any]:
        (x, history), deep = carried
        if request.cache_interval is not None:
            is_whole = (i == first) | (i % request.cache_interval == 0)
            output, deep = jax.lax.cond(is_whole, whole, shallow, i, x, deep)
        elif request.guided is not None:
            output = jax.lax.cond(request.guided[i], everywhere, unguided, i, x)
        else:
            output = everywhere(i, x)
        noise = None
        if sampler.stochastic:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(request.keys, i + 1)
            channels_first = (x.shape[3], x.shape[1], x.shape[2])
            noise = _noise(keys, channels_first).transpose(0, 2, 3, 1)
        return sampler.step(schedule, i, x, output, history, noise, request.eta), deep

    deep = None
    if request.cache_interval is not None:
        shape = jax.eval_shape(whole, first, state[0], None)[1]
        deep = _varying(jnp.zeros(shape.shape, shape.dtype), like=state)
    return jax.lax.fori_loop(first, last, evaluate, (state, deep))[0]


@jax.jit
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


def to_uint8(pictures: Float[Array, "N H W 3"]) -> np.ndarray:
    """Pictures in [0, 1] as 8-bit arrays on the host."""
    return np.round(np.asarray(pictures) * 255).astype(np.uint8)


@dataclass(frozen=True)
class _Rule:
    """What a number may be, and the dtype that it has on the device."""

    dtype: Any
    expected: str
    holds: Callable[[Any], bool]


_WHOLE = _Rule(
    jnp.uint32, "a whole number from 0 to 4294967295", lambda value: isinstance(value, int) and 0 <= value < 2**32
)
_FINITE = _Rule(jnp.float32, "a finite number", lambda value: abs(value) <= float(np.finfo(np.float32).max))
_SHARE = _Rule(jnp.float32, "0 to 1", lambda value: 0 <= value <= 1)


def _unguided(guidance_scale: Any) -> bool:
    """Whether no picture is guided, as far as the host knows without asking a device."""
    return _on_host(guidance_scale) and bool(np.all(np.asarray(guidance_scale) <= 1))


def _on_host(values: Any) -> bool:
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values))


def _rows(name: str, values: Any, count: int, rule: _Rule) -> Array:
    """One value a picture."""
    if _on_host(values):
        for value in np.ravel(values).tolist():
            if not rule.holds(value):
                raise InputError(f"{name} is {value!r}, expected {rule.expected}: choose another")
    array = jnp.asarray(values, rule.dtype)
    if array.shape not in ((), (1,), (count,)):
        raise InputError(f"{name} has shape {array.shape}, expected {(count,)}, one value a picture, or one for all")
    return jnp.broadcast_to(array, (count,))


@jax.jit
def _keys(seeds: Array, indices: Array) -> Key[Array, " N"]:
    key_of = partial(jax.random.key, impl="threefry2x32")
    return jax.vmap(lambda seed, index: jax.random.fold_in(key_of(seed), index))(seeds, indices)


@partial(jax.jit, static_argnums=1)
def _noise(keys: Key[Array, " N"], shape: tuple[int, ...]) -> Float[Array, "N C h w"]:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _varying(state: Any, like: Any) -> Any:
    """Inside shard_map a type tells over which axes of the mesh values differ, and a loop has to end with the type
    that it began with: that of its results, which differ wherever anything that they depend on does."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves((state, like))))

    def vary(leaf: Array) -> Array:
        missing = tuple(axes - varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, state)
