"""The guided loop over the sampler's steps: one compiled program for any piece of it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.executables import kept_program
from sdipc_jax.models import winograd
from sdipc_jax.models.weighted import WeightedContexts, cross_attention_layers
from sdipc_jax.samplers import SAMPLERS
from sdipc_jax.sampling.control import control_residuals
from sdipc_jax.sampling.noise import draw_noise
from sdipc_jax.sampling.request import Request, State
from sdipc_jax.sampling.weights import pooled_at
from sdipc_jax.tracing import under_our_rules, varying


@kept_program(static_argnames=("differentiable",))
@under_our_rules
def advance(
    bundle: Bundle, request: Request, state: State, first: Any, last: Any, *, differentiable: bool = False
) -> State:
    """Evaluations `first` to `last` (excluded) of the loop. The bounds are traced: one program for any piece.

    Where the whole UNet does not always run, it runs at `first` in any case.

    Args:
        differentiable: run all evaluations, whatever the bounds say, in a form that has a gradient. Of each step only
            what comes in is kept; the rest is computed again on the way back.
    """
    sampler = SAMPLERS[request.sampler]
    state = varying(state, like=(bundle, request))
    schedule, guidance = request.schedule, request.guidance_scale
    count, every = state[0].shape[0], request.context.shape[0]
    predict = partial(predicted, bundle, request)

    def guide(prediction: Float[Array, "M h w C"]) -> Float[Array, "N h w C"]:
        prediction = prediction.astype(jnp.float32)
        if len(prediction) == count:
            return prediction
        unconditional, conditional = jnp.split(prediction, 2)
        return jnp.where(guidance > 1, unconditional + guidance * (conditional - unconditional), conditional)

    def everywhere(i: Array, x: Array) -> Float[Array, "N h w C"]:
        return guide(predict(i, x, every))

    def unguided(i: Array, x: Array) -> Float[Array, "N h w C"]:
        return guide(predict(i, x, count))

    def whole(i: Array, x: Array, _: Any) -> tuple[Float[Array, "N h w C"], Any]:
        prediction, kept = predict(i, x, every, keep=True)
        return guide(prediction), kept

    def shallow(i: Array, x: Array, kept: Any) -> tuple[Float[Array, "N h w C"], Any]:
        return guide(predict(i, x, every, kept)), kept

    def evaluate(i: Array, carried: tuple[State, Any]) -> tuple[State, Any]:
        (x, history), kept = carried
        if request.cache_interval is not None:
            is_whole = (i == first) | (i % request.cache_interval == 0)
            output, kept = jax.lax.cond(is_whole, whole, shallow, i, x, kept)
        elif request.guided is not None:
            output = jax.lax.cond(request.guided[i], everywhere, unguided, i, x)
        else:
            output = everywhere(i, x)
        noise = None
        if sampler.stochastic:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(request.keys, i + 1)
            channels_first = (x.shape[3], x.shape[1], x.shape[2])
            noise = draw_noise(keys, channels_first).transpose(0, 2, 3, 1)
        x, history = sampler.step(schedule, i, x, output, history, noise, request.eta)
        if request.repainting is not None:
            x = request.repainting.keep(x, *(level[i + 1] for level in schedule.levels))
        return (x, history), kept

    kept = None
    if request.cache_interval is not None:
        like = jax.eval_shape(whole, first, state[0], None)[1]
        kept = varying(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), like=state)
    if differentiable:
        step = jax.checkpoint(evaluate)
        indices = jnp.arange(request.evaluations)
        return jax.lax.scan(lambda carried, i: (step(i, carried), None), (state, kept), indices)[0][0]
    return jax.lax.fori_loop(first, last, evaluate, (state, kept))[0]


def predicted(
    bundle: Bundle,
    request: Request,
    i: Any,
    x: Float[Array, "N h w C"],
    rows: int,
    kept: Any = None,
    keep: bool = False,
    *,
    watched: str | None = None,
) -> Any:
    """What the UNet says at evaluation i of the last rows of the prompts, all or those that are no negative ones.

    Args:
        kept: what the last whole run left for those that go without the deep part.
        keep: return the like too.
        watched: return instead what the UNet's layers put into this collection.
    """
    config, schedule = bundle.config, request.schedule
    count, every = x.shape[0], request.context.shape[0]
    context: Any = request.context
    weights, added = request.weights, request.added
    if rows < every:
        context, weights, added = jax.tree.map(lambda leaf: leaf[-rows:], (context, weights, added))
    scaled = (schedule.input_scale[i] * x).astype(config.compute_dtype)
    if request.repainting is not None and request.repainting.channels is not None:
        scaled = jnp.concatenate([scaled, request.repainting.channels.astype(scaled.dtype)], axis=-1)
    inputs = jnp.concatenate([scaled] * (rows // count))
    timesteps = jnp.full(len(inputs), schedule.timesteps[i])
    if weights is not None:
        step = i if weights.shape[3] > 1 else 0
        context = WeightedContexts(context, weights[:, :, :, step], cross_attention_layers(config.unet))
        if "text_embeds" in added:
            added = added | {"text_embeds": pooled_at(weights, added["text_embeds"], i)}
    if kept is None:
        deep = None
        residuals = control_residuals(bundle, request.controls, i, inputs, timesteps, context, **added)
    else:
        deep, residuals = kept
    unet = {"params": bundle.params["unet"], winograd.COLLECTION: request.winograd}
    told = request.guidance_scale[:, 0, 0, 0] if config.unet.embeds_guidance else None
    options: dict[str, Any] = {"with_deep": keep, "residuals": residuals, "guidance_scale": told}
    if watched is not None:
        return config.unet_model.apply(unet, inputs, timesteps, context, deep, mutable=[watched], **options, **added)[1]
    output = config.unet_model.apply(unet, inputs, timesteps, context, deep, **options, **added)
    # The rest of what is controlled lies in the deep part.
    return (output[0], (output[1], residuals[:1])) if keep else output
