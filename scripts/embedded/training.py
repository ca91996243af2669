"""What the stages share: the loop under a time budget, resumable state, metrics."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float
from safetensors.numpy import load_file, save_file

from sdipc_jax.checkpoints.keys import flatten, unflatten

Tree = dict[str, Any]
LossFunction = Callable[[Tree, Tree, Tree, Array], tuple[Float[Array, ""], Tree]]

_FIRST_MOMENT, _SECOND_MOMENT = 0.9, 0.99
_REFRESH = 100


@dataclasses.dataclass
class State:
    """Everything that the next step depends on, but for the data."""

    params: Tree
    ema: Tree
    optimizer: Any
    step: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long a stage runs and how its learning rate goes: up over `warmup` steps, then down a cosine of time.

    The cosine follows the clock and not the steps, since what a shared machine does in a minute is not known.
    """

    minutes: float
    learning_rate: float
    warmup: int
    weight_decay: float
    ema: float
    muon: bool = False
    floor: float = 0.02

    def rate(self, state: State) -> float:
        share = min(1.0, state.seconds / (60 * self.minutes))
        cosine = self.floor + (1 - self.floor) * 0.5 * (1 + np.cos(np.pi * share))
        return self.learning_rate * cosine * min(1.0, (state.step + 1) / self.warmup)


def _optimizer(budget: Budget) -> optax.GradientTransformation:
    """AdamW or Muon without its learning rate, which the step applies; only matrices and kernels decay."""
    scaling = optax.scale_by_adam(_FIRST_MOMENT, _SECOND_MOMENT)
    if budget.muon:
        scaling = optax.partition({"muon": _muon(), "adam": scaling}, _kinds)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        scaling,
        optax.add_decayed_weights(
            budget.weight_decay, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        ),
    )


def _muon() -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the layers' kernels, with steps as long as Adam's (Liu et al. 2025, eq. 4).

    A convolution is a matrix from its window to its channels. Matrices of one shape are made orthogonal together:
    one by one they are a thousand small products a step, and minutes of compilation.
    """
    one_by_one = partial(jax.tree.map, lambda _: optax.contrib.MuonDimensionNumbers((1,), (2,)))
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=one_by_one)

    def matrix_shape(leaf: Array) -> tuple[int, int]:
        return leaf.size // leaf.shape[-1], leaf.shape[-1]

    def stacked(tree: Tree) -> dict[tuple[int, int], Array]:
        groups: dict[tuple[int, int], list[Array]] = {}
        for leaf in jax.tree.leaves(tree):
            shape = matrix_shape(leaf)
            groups.setdefault(shape, []).append(leaf.reshape(shape))
        return {shape: jnp.stack(matrices) for shape, matrices in groups.items()}

    def update(gradients: Tree, state: Any, params: Any = None) -> tuple[Tree, Any]:
        steps, state = muon.update(stacked(gradients), state)
        following = {shape: iter(matrices) for shape, matrices in steps.items()}

        def lengthened(leaf: Array) -> Array:
            shape = matrix_shape(leaf)
            return (0.2 * max(shape) ** 0.5 * next(following[shape])).reshape(leaf.shape)

        return jax.tree.map(lengthened, gradients), state

    return optax.GradientTransformation(lambda params: muon.init(stacked(params)), update)


def _kinds(params: Tree) -> Tree:
    """Which optimizer a leaf has: kernels inside layers and blocks are Muon's."""

    def kind(path: tuple[Any, ...], leaf: Array) -> str:
        names = [part.key for part in path]
        inside = any("layers" in name or "block" in name for name in names)
        return "muon" if leaf.ndim >= 2 and names[-1] == "kernel" and inside else "adam"

    return jax.tree.map_with_path(kind, params)


def train(
    name: str,
    params: Tree,
    loss: LossFunction,
    data: Tree,
    batches: Callable[[int], Tree],
    budget: Budget,
    folder: Path,
    *,
    seed: int,
    evaluate: Callable[[Tree], Tree] | None = None,
    refresh: Callable[[Tree], Tree] | None = None,
) -> Tree:
    """Trains until the budget is spent and returns the averaged parameters; continues from `folder` if it can.

    Args:
        name: of the stage; its state is `<folder>/<name>.safetensors`.
        params: where training starts if there is no state yet.
        loss: (parameters, data, batch, key) to the loss and what to log.
        data: arrays that stay on the device, for batches to point into.
        batches: from a step's number to the batches of that step and the next few, stacked, (steps, N, ...), which one
            program runs. A function of the number alone.
        evaluate: measures the averaged parameters every few minutes.
        refresh: makes more entries of `data` from the parameters; they stand for a hundred steps.
    """
    optimizer = _optimizer(budget)
    with on_host():
        state = _restore(folder / f"{name}.safetensors", State(params, params, jax.jit(optimizer.init)(params)))
    device = jax.local_devices()[0]
    state.params, state.ema, state.optimizer = jax.device_put((state.params, state.ema, state.optimizer), device)
    key = jax.random.key(seed)

    def update(carry: tuple[Tree, Tree, Any], data: Tree, step: Array, batch: Tree, rate: Array) -> tuple[Any, Tree]:
        params, ema, moments = carry
        drawn = jax.random.fold_in(key, step)
        gradients, metrics = jax.grad(loss, has_aux=True)(params, data, batch, drawn)
        updates, moments = optimizer.update(gradients, moments, params)
        params = jax.tree.map(lambda leaf, change: leaf - rate * change, params, updates)
        # The average forgets the first steps quickly: its horizon grows with their number.
        decay = jnp.minimum(budget.ema, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda mean, leaf: decay * mean + (1 - decay) * leaf, ema, params)
        return (params, ema, moments), metrics

    @partial(jax.jit, donate_argnums=0)
    def updates(
        carry: tuple[Tree, Tree, Any], data: Tree, first: Array, batches: Tree, rate: Array
    ) -> tuple[Any, Tree]:
        steps = first + jnp.arange(len(jax.tree.leaves(batches)[0]))
        if len(steps) == 1:
            # On CPUs the gradients of convolutions are many times slower inside a loop, even one of a single turn.
            return update(carry, data, first, jax.tree.map(lambda rows: rows[0], batches), rate)
        carry, metrics = jax.lax.scan(lambda carry, xs: update(carry, data, *xs, rate), carry, (steps, batches))
        return carry, jax.tree.map(jnp.sum, metrics)

    data = jax.device_put(data, device)
    refreshed = jax.device_put(refresh(state.params), device) if refresh is not None else {}
    refreshed_at = state.step

    def arguments() -> tuple[Any, ...]:
        stack = {name: jnp.asarray(rows) for name, rows in batches(state.step).items()}
        rate = jnp.float32(budget.rate(state))
        return (state.params, state.ema, state.optimizer), data | refreshed, jnp.int32(state.step), stack, rate

    # Ahead of time: the budget is for training.
    compiled = updates.lower(*arguments()).compile()
    logged = saved = judged = time.monotonic()
    waiting: list[Tree] = []
    logged_step, pictures = state.step, 0
    while state.seconds < 60 * budget.minutes:
        started = time.monotonic()
        if refresh is not None and state.step >= refreshed_at + _REFRESH:
            refreshed, refreshed_at = jax.device_put(refresh(state.params), device), state.step
        *others, stack, rate = arguments()
        carry, metrics = compiled(*others, stack, rate)
        state.params, state.ema, state.optimizer = carry
        # One call may run while the next is made ready; more would only make the clock wrong.
        if waiting:
            jax.block_until_ready(waiting[-1])
        waiting.append(metrics)
        steps, count = next(iter(stack.values())).shape[:2]
        pictures += steps * count
        state.step += steps
        now = time.monotonic()
        state.seconds += now - started
        if now - logged > 20:
            means = {
                key: round(sum(float(metrics[key]) for metrics in waiting) / (state.step - logged_step), 5)
                for key in waiting[0]
            }
            speed = {"pictures_per_second": round(pictures / (now - logged), 1), "rate": round(float(rate), 6)}
            log(folder, {"stage": name, "step": state.step, "minutes": round(state.seconds / 60, 2)} | means | speed)
            logged, waiting, logged_step, pictures = now, [], state.step, 0
        if now - saved > 90:
            _save(folder / f"{name}.safetensors", state)
            saved = now
        if evaluate is not None and now - judged > 480:
            log(folder, {"stage": name, "step": state.step} | evaluate(state.ema))
            judged = logged = saved = time.monotonic()
            logged_step, waiting, pictures = state.step, [], 0
    _save(folder / f"{name}.safetensors", state)
    if evaluate is not None:
        log(folder, {"stage": name, "step": state.step, "final": True} | evaluate(state.ema))
    return state.ema


def arithmetic() -> Any:
    """What the towers and the UNet compute in: accelerators have units for bfloat16, the weights stay float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def on_host() -> AbstractContextManager[None]:
    """Where to do a thousand little things, each of which an accelerator would compile a program for."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def steps_at_once(most: int) -> int:
    """How many steps a program has: an accelerator is done with one sooner than Python."""
    return 1 if jax.default_backend() == "cpu" else most


def log(folder: Path, values: Tree) -> None:
    """Prints the values and appends them to metrics.jsonl."""
    line = json.dumps(values)
    print(line, flush=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def averaged(folder: Path, name: str) -> Tree | None:
    """The averaged parameters that a stage has reached, or None if it has not begun."""
    path = folder / f"{name}.safetensors"
    return _unpack(load_file(path))["ema"] if path.is_file() else None


def save_tree(path: Path, tree: Tree) -> None:
    """Writes nested dicts of arrays so that the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {".".join(names): np.array(leaf, order="C") for names, leaf in flatten(tree).items()}
    temporary = path.with_suffix(".tmp")
    save_file(arrays, temporary)
    os.replace(temporary, path)


def load_tree(path: Path) -> Tree:
    """What `save_tree` wrote."""
    return _unpack(load_file(path))


def _unpack(arrays: Tree) -> Tree:
    return unflatten({tuple(name.split(".")): jnp.asarray(leaf) for name, leaf in arrays.items()})


def _save(path: Path, state: State) -> None:
    moments = {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    progress = {"step": np.int64(state.step), "seconds": np.float64(state.seconds)}
    save_tree(path, {"params": state.params, "ema": state.ema, "optimizer": moments, "progress": progress})


def _restore(path: Path, fresh: State) -> State:
    if not path.is_file():
        # The step donates its arguments: no two of them may share memory.
        return dataclasses.replace(
            fresh, ema=jax.tree.map(jnp.array, fresh.params), params=jax.tree.map(jnp.array, fresh.params)
        )
    tree = load_file(path)
    leaves, structure = jax.tree.flatten(fresh.optimizer)
    saved = [tree[name] for name in sorted(tree) if name.startswith("optimizer.")]
    moments = [jnp.asarray(old).reshape(new.shape) for new, old in zip(leaves, saved, strict=True)]
    loaded = _unpack({name: leaf for name, leaf in tree.items() if name.startswith(("params.", "ema."))})
    optimizer = jax.tree.unflatten(structure, moments)
    step, seconds = tree["progress.step"].item(), tree["progress.seconds"].item()
    params, ema = (
        jax.tree.map(lambda new, old: old.reshape(new.shape), fresh.params, loaded[name]) for name in ("params", "ema")
    )
    return State(params, ema, optimizer, step, seconds)
