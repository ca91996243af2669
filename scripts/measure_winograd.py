"""Whether Winograd's form of a UNet's convolutions is quicker on this machine: each shape alone, in every form.

python scripts/measure_winograd.py --model sdxl --dtype float32

The forms of one shape take turns, after a first run each; told are the medians, in milliseconds, and what all
convolutions of an evaluation take together, by their number. Weights and pictures are random. In bfloat16, Winograd's
form is computed in float32, with kernels in float32, since that is what its products and sums need.
"""

import argparse
import collections
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.sizes import sd15, sdxl
from flax import linen as nn

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.compilation import use_eigen
from sdipc_jax.models import winograd
from sdipc_jax.models.layers import Conv

SIZES = {"sd15": sd15, "sdxl": sdxl}
FORMS = ("plain", "F(2x2)", "F(4x4)")


class Shape(NamedTuple):
    """Of a convolution of stride 1 with a 3 x 3 kernel."""

    side: int
    channels: int
    features: int


def convolutions(config: Config) -> dict[Shape, int]:
    """How often the UNet has each, for latents of the checkpoint's own size; found by tracing."""
    found: dict[tuple[str, ...], Shape] = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_call = isinstance(module, Conv) and context.method_name == "__call__"
        if is_call and module.kernel_size == (3, 3) and module.strides == (1, 1):
            found[module.path] = Shape(args[0].shape[2], args[0].shape[3], module.features)
        return call(*args, **kwargs)

    _, height, width = config.latent_shape(config.defaults.height, config.defaults.width)
    inputs = (
        jax.ShapeDtypeStruct((1, height, width, config.unet.in_channels), config.compute_dtype),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, config.tokens.length, config.unet.cross_attention_dim), config.compute_dtype),
    )
    with nn.intercept_methods(note):
        jax.eval_shape(config.unet_model.init, jax.random.key(0), *inputs, **config.added_inputs(1))
    return collections.Counter(found.values())


def programs(shape: Shape, dtype: Any, batch: int) -> list[Callable[[], Any]]:
    """What runs each of `FORMS` on the same random numbers, compiled at the first call."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, shape.side, shape.side, shape.channels), np.float32), dtype)
    kernel = rng.standard_normal((3, 3, shape.channels, shape.features), np.float32) / np.sqrt(9 * shape.channels)
    layer = Conv(
        shape.features, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, dtype=dtype, param_dtype=dtype,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )  # fmt: skip

    @jax.jit
    def in_tiles(x: Any, kernel: Any) -> Any:
        return winograd.convolve(x.astype(jnp.float32), kernel).astype(dtype)

    plain = partial(jax.jit(layer.apply), {"params": {"kernel": jnp.asarray(kernel, dtype)}}, x)
    return [plain, *(partial(in_tiles, x, winograd.in_tiles(jnp.asarray(kernel), tile)) for tile in (2, 4))]


def seconds(programs: list[Callable[[], Any]], runs: int) -> list[float]:
    """The median of each; they take turns."""
    found: list[list[float]] = [[] for _ in programs]
    for run in programs:
        jax.block_until_ready(run())
    for _ in range(runs):
        for run, times in zip(programs, found, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in found]


def chosen(shape: Shape) -> str:
    """The form that the package takes in float32."""
    kernel = jax.ShapeDtypeStruct((3, 3, shape.channels, shape.features), jnp.float32)
    transformed: Any = jax.eval_shape(lambda kernel: winograd.transform_kernel(kernel, shape.side, shape.side), kernel)
    return "plain" if transformed is None else {16: "F(2x2)", 36: "F(4x4)"}[len(transformed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=SIZES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2], help="rows: a guided picture is two")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    use_eigen()
    config = SIZES[arguments.model](arguments.dtype)
    print(f"{jax.local_devices()[0].device_kind}, jax {jax.__version__}, {arguments.model}, {arguments.dtype}\n")
    print(f"| rows | side | channels | calls | {' | '.join(FORMS)} | taken in float32 |\n|{'---|' * 8}")
    for batch in arguments.batch:
        together = dict.fromkeys((*FORMS, "taken"), 0.0)
        for shape, calls in sorted(convolutions(config).items(), reverse=True):
            took = dict(zip(FORMS, seconds(programs(shape, config.compute_dtype, batch), arguments.runs), strict=True))
            took["taken"] = took[chosen(shape)]
            cells = " | ".join(f"{1000 * took[form]:.0f}" for form in FORMS)
            channels = f"{shape.channels} to {shape.features}"
            print(f"| {batch} | {shape.side} | {channels} | {calls} | {cells} | {chosen(shape)} |", flush=True)
            together = {form: total + calls * took[form] for form, total in together.items()}
        cells = " | ".join(f"{1000 * each:.0f}" for each in together.values())
        print(f"| {batch} | all | | {sum(convolutions(config).values())} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
