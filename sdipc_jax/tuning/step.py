"""Training as a pure function of its state: `init`, `step`, and what comes of it.

state = tuning.init(bundle, settings)
for batch, key in ...:
    state, metrics = tuning.step(state, batch, key)
tuned = tuning.apply(bundle, tuning.delta(state))
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from sdipc_jax.checkpoints.bundle import Bundle, Params
from sdipc_jax.checkpoints.delta import Delta, digest, make_delta
from sdipc_jax.errors import InputError
from sdipc_jax.prompts.projection import Projection
from sdipc_jax.tracing import varying_axes
from sdipc_jax.tuning.losses import Batch, Draws, check_batch, draw, objective
from sdipc_jax.tuning.settings import TuningSettings
from sdipc_jax.tuning.trainable import Frozen, split

Metrics = dict[str, Float[Array, ""]]
# What a step changes of a state: step, params, ema, optimizer.
Moving = tuple[Any, Any, Any, Any]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "ema", "optimizer", "frozen"],
    meta_fields=["settings", "base"],
)
@dataclasses.dataclass(frozen=True)
class State:
    """All that the next step depends on, but for its batch and key. A pytree.

    A checkpoint of a run needs what `moving` gives; the rest comes from `init`.

    Attributes:
        step: batches seen, ().
        params: the leaves that train, float32, in the places that they have in a bundle's tree.
        ema: their average, None without.
        optimizer: optax's state.
        frozen: everything else that the loss reads; `step` passes it on as it is.
        settings: static.
        base: digest of the checkpoint that is tuned.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params | None
    optimizer: Any
    frozen: Frozen
    settings: TuningSettings
    base: str


def init(bundle: Bundle, settings: TuningSettings, projection: Projection | None = None) -> State:
    """The state before the first step.

    Args:
        bundle: the checkpoint to tune, loaded in float32.
        settings: with `steps` given or worked out by `for_pictures` if the rate follows a cosine.
        projection: eq. 6 with another cut-off, scale or mode than the checkpoint's, or where the inverse does not reach
            what `calibrate` gives; it stays fixed.

    Raises:
        InputError: the checkpoint cannot take pictures as prompts, or the settings do not fit it.
    """
    if settings.schedule == "cosine" and settings.steps is None:
        raise InputError("steps is not given, expected how long the cosine is: give it, or use for_pictures(count)")
    params, frozen = split(bundle, settings, projection)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if settings.ema else None,
        optimizer=jax.jit(make_optimizer(settings).init)(params),
        frozen=frozen,
        settings=settings,
        base=digest(bundle),
    )


@partial(jax.jit, static_argnames=("axis_name", "turns"))
def step(
    state: State, batch: Batch, key: Key[Array, ""], *, axis_name: str | None = None, turns: int = 1
) -> tuple[State, Metrics]:
    """One batch of training. Pure and compiled; works under `jit`, `vmap` and `shard_map`.

    Args:
        key: of this update; batches that are accumulated for one update share it, and tell their `rows` apart.
        axis_name: of the mesh's axis that the batch is divided over, inside `shard_map` or `pmap`. The gradients of
            what trains and the metrics are averaged over it, and nothing else is exchanged.
        turns: into how many equal parts the batch (a device's part of it) is divided, a divisor of its rows. They
            come one after the other and their gradients are averaged: the same step to rounding, in one part's memory.

    Returns:
        The next state, and `loss`, `loss_image`, `loss_text` (if it counts), `gradient_norm` and `learning_rate`.

    Raises:
        InputError: the batch lacks what the settings need.
    """
    settings = state.settings
    check_batch(batch, settings)
    draws = draw(key, row_numbers(batch, axis_name), state.frozen, settings, batch)
    params = state.params
    if axis_name is not None and axis_name in varying_axes(draws.noise):
        # Each device's own gradients, averaged by name below: left to itself, a shard_map that checks would sum them.
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis_name, to="varying"), params)
    differentiated = jax.value_and_grad(objective(settings), has_aux=True)

    def of(rows: tuple[Batch, Draws]) -> Any:
        return differentiated(params, state.frozen, settings, *rows)

    (total, parts), gradients = in_turns(of, (batch, draws), turns, lambda leaf: leaf.mean(axis=0))
    metrics = {"loss": total, **parts}
    if axis_name is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    metrics["learning_rate"] = jnp.asarray(_schedule(settings)(state.step // settings.accumulate), jnp.float32)
    updates, optimizer = make_optimizer(settings).update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    next_state = dataclasses.replace(
        state, step=state.step + 1, params=params, ema=_average(state, params), optimizer=optimizer
    )
    return next_state, metrics


def in_turns(function: Callable[[Any], Any], rows: Any, turns: int, join: Callable[[Array], Array]) -> Any:
    """What a function gives for some rows, taken in equal parts one after the other.

    Args:
        join: from what it gives for each part, (turns, ...), to what it gives for all.
    """
    if turns == 1:
        # Without a loop, in which convolutions may be slower.
        return function(rows)
    parts = jax.tree.map(lambda leaf: jnp.reshape(leaf, (turns, len(leaf) // turns, *leaf.shape[1:])), rows)
    return jax.tree.map(join, jax.lax.map(function, parts))


def moving(state: State) -> Moving:
    """What a step changes of a state, and a checkpoint of a run holds."""
    return state.step, state.params, state.ema, state.optimizer


def with_moving(state: State, parts: Moving) -> State:
    """The state with these parts."""
    step, params, ema, optimizer = parts
    return dataclasses.replace(state, step=step, params=params, ema=ema, optimizer=optimizer)


def row_numbers(batch: Batch, axis_name: str | None = None) -> Int[Array, " N"]:
    """The batch's own numbers, else counted from 0 over all devices' parts."""
    if "rows" in batch:
        return jnp.asarray(batch["rows"])
    count = len(batch["latents"])
    first = 0 if axis_name is None else count * jax.lax.axis_index(axis_name)
    return first + jnp.arange(count)


def delta(state: State) -> Delta:
    """The result so far: the averaged weights if there are any, else the last."""
    prompts = state.frozen.config.vision_side.prompts
    return make_delta(
        state.params if state.ema is None else state.ema,
        state.step,
        state.settings.mode,
        state.base,
        prompts is not None and prompts.overwrite_first_layer,
    )


def make_optimizer(settings: TuningSettings) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW (Loshchilov and Hutter 2019, Algorithm 2), and the mean of `accumulate` batches before both."""
    parts = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
    if settings.optimizer == "adamw":
        parts.append(optax.scale_by_adam(*settings.betas))
    parts.append(optax.add_decayed_weights(settings.weight_decay))
    parts.append(optax.scale_by_learning_rate(_schedule(settings)))
    if settings.prompt_learning_rate is not None:
        ratio = settings.prompt_learning_rate / settings.learning_rate
        parts.append(optax.masked(optax.scale(ratio), _is_prompt))
    whole = optax.chain(*parts)
    if settings.accumulate == 1:
        return optax.with_extra_args_support(whole)
    return optax.MultiSteps(whole, settings.accumulate).gradient_transformation()


def _schedule(settings: TuningSettings) -> optax.Schedule:
    if settings.schedule == "constant":
        return optax.constant_schedule(settings.learning_rate)
    return optax.cosine_decay_schedule(settings.learning_rate, settings.steps or 1)


def _is_prompt(params: Params) -> Params:
    return jax.tree.map_with_path(
        lambda path, _: any(getattr(part, "key", None) == "deep_prompts" for part in path), params
    )


def _average(state: State, params: Params) -> Params | None:
    """The next exponential average, where this batch completed an update."""
    if state.ema is None:
        return None
    every = state.settings.accumulate
    updates = (state.step + 1) // every
    # Its horizon grows with the updates: the first weights are soon forgotten.
    decay = jnp.minimum(state.settings.ema, (1 + updates) / (10 + updates))
    decay = jnp.where((state.step + 1) % every == 0, decay, 1.0)
    return jax.tree.map(lambda mean, leaf: decay * mean + (1 - decay) * leaf, state.ema, params)
