"""This package, timed. `python -m benchmarks.jax_side [--fused-depth=N] [--candidate=NAME]`, with a work on stdin."""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdipc_jax as sdipc
from benchmarks.candidates import CANDIDATES
from benchmarks.flops import flops_of
from benchmarks.sizes import sd15, sdxl, small_sdxl
from benchmarks.work import COPIED, GUIDANCE, PRODUCT, Ready, Work, process_peak, serve, tuning_batch
from sdipc_jax import tuning
from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.checkpoints.load import load_weights, read_config
from sdipc_jax.compilation import keep_memory, use_eigen
from sdipc_jax.models import attention
from sdipc_jax.models.layers import precision
from sdipc_jax.sampling.decoding import finish, to_uint8
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from sdipc_jax.settings import FAST
from tests.random_weights import random_tree


def times() -> int:
    """Of a product or a copy in a run: accelerators are done with one sooner than they are told to begin."""
    return 1 if jax.default_backend() == "cpu" else 50


class JaxSide:
    def make(self, work: Work) -> tuple[Ready, Callable[[], Any]]:
        if work.part == "tune":
            # As the command does.
            keep_memory()
        run, flops = self.program(work)
        moved = times() * 2.0 * 4 * COPIED if work.part == "copy" else 0.0
        started = time.perf_counter()
        run()
        compiled = time.perf_counter() - started
        device = jax.local_devices()[0].device_kind
        return Ready(flops, moved, compiled, f"{device}, jax {jax.__version__}, {work.dtype}"), run

    def program(self, work: Work) -> tuple[Callable[[], Any], float]:
        """What to run, and its arithmetic."""
        if work.part == "product":
            x = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT), work.dtype) / PRODUCT**0.5

            def multiply(_: int, y: Any) -> Any:
                return jnp.dot(y, x, precision=precision(x.dtype))

            product = jax.jit(lambda x: jax.lax.fori_loop(0, times(), multiply, x))
            return (lambda: jax.block_until_ready(product(x))), times() * 2.0 * PRODUCT**3
        if work.part == "copy":
            numbers = jnp.zeros(COPIED, jnp.float32)
            # Something new, so that it cannot be left away.
            copy = jax.jit(lambda x: jax.lax.fori_loop(0, times(), lambda _, y: y + 1, x))
            return (lambda: jax.block_until_ready(copy(numbers))), 0.0
        bundle = bundle_for(work)
        config = bundle.config
        if work.part == "encode":
            side = config.vision_side.vision.image_size
            pixels = jnp.asarray(np.random.default_rng(0).standard_normal((work.batch, side, side, 3), np.float32))
            projection = sdipc.closed_form(bundle, scale=27.5)

            def encode() -> Any:
                return jax.block_until_ready(sdipc.convert(projection, sdipc.encode_images(bundle, pixels)))

            return encode, flops_of(sdipc.encode_images, bundle, pixels)
        if work.part == "tune":
            return tuning_step(bundle, work.batch)
        # The bundle has the parts that the work needs, and no others.
        latent = config.latent_shape(config.defaults.height, config.defaults.width)
        latents = jnp.asarray(np.random.default_rng(2).standard_normal((work.batch, *latent), np.float32))
        state = latents.transpose(0, 2, 3, 1), ()
        if work.part != "unet":
            decoding = flops_of(partial(apply, config.vae_model, bundle.params["vae"], state[0], method="decode"))
        if work.part == "decode":
            return (lambda: jax.block_until_ready(finish(bundle, state))), decoding
        shape = (work.batch, config.tokens.length, config.unet.cross_attention_dim)
        context: Any = jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))
        if config.text_2 is not None:
            context = sdipc.Prompt(context, jnp.ones((work.batch, config.text_2.projection_dim)))
        negative = jax.tree.map(lambda leaf: leaf[:1] * 0.5, context)
        settings: dict[str, Any] = {"seeds": 0, "indices": np.arange(work.batch), "guidance_scale": GUIDANCE}
        settings |= {"negative": negative, "steps": work.steps or 50, "latents": latents}
        settings |= {"sampler": "ddim" if config.text_2 is None else "euler"}
        settings |= FAST if work.fast else {}
        request, state = begin(bundle, context, **settings)
        # Useful arithmetic is that of plain convolutions.
        plain = flops_of(advance, bundle, dataclasses.replace(request, winograd={}), state, 0, 1)
        if work.part == "unet":
            return (lambda: jax.block_until_ready(advance(bundle, request, state, 0, work.row))), work.row * plain

        def pictures() -> Any:
            return to_uint8(sdipc.generate(bundle, context, **settings))

        # Nothing is counted where less than the whole UNet runs.
        return pictures, 0.0 if work.fast else work.steps * plain + decoding

    def peak_bytes(self) -> int:
        """The device's, where it tells."""
        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else process_peak()


def tuning_step(bundle: Bundle, batch: int) -> tuple[Callable[[], Any], float]:
    """A step with everything that it does, drawing its random numbers included."""
    state = tuning.init(bundle, tuning.TuningSettings(mode="ct"))
    arrays, key = tuning_batch(bundle.config, batch), jax.random.key(0)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(tuning.step(state, arrays, key))

    return step, flops_of(tuning.step, state, arrays, key)


def bundle_for(work: Work) -> Bundle:
    """The parts that the work needs, and no others."""
    if work.model == "embedded":
        return load_weights(read_config("embedded", dtype=work.dtype))
    config = {"sd15": sd15, "sdxl": sdxl, "small sdxl": small_sdxl}[work.model](work.dtype)
    needed = {"unet": ["unet"], "decode": ["vae"], "encode": ["clip"], "picture": ["unet", "vae"]}[work.part]
    shapes = config.abstract_params()
    shapes = {name: shapes[name] for name in needed}
    # Leaf by leaf, so that there is never a second copy of the weights.
    params = {
        name: random_tree(shapes[name], seed=0, place=lambda leaf, like: jnp.asarray(leaf, like.dtype))
        for name in needed
    }
    return Bundle(params, config)


if __name__ == "__main__":
    # As the command does.
    use_eigen()
    for name, _, value in (argument.partition("=") for argument in sys.argv[1:]):
        if name == "--candidate":
            CANDIDATES[value]()
        else:
            attention.FUSED_DEPTH = int(value)
    serve(JaxSide())
