"""Where the time of one guided evaluation of Stable Diffusion 1.5's UNet goes: each kind of layer alone, and the whole.

python scripts/profile_unet.py --dtype float32 --side 512

Layers are timed in programs of their own, on random weights, so that what XLA fuses across them is left out: the sum of
the parts is not the whole.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.flops import flops_of
from benchmarks.sizes import sd15
from flax import linen as nn

from sdipc_jax.compilation import use_eigen
from sdipc_jax.models import winograd
from sdipc_jax.models.attention import Attention, FeedForward
from sdipc_jax.models.unet import Downsample2D, ResnetBlock2D, Upsample2D

_KINDS: dict[type, str] = {
    ResnetBlock2D: "resnet",
    FeedForward: "feed-forward",
    Downsample2D: "half the size",
    Upsample2D: "twice the size",
}


@dataclass
class Layer:
    """Calls of equal layers with inputs of equal shapes.

    Attributes:
        inputs: shapes of arrays, or numbers as they are.
    """

    kind: str
    side: int
    module: nn.Module
    inputs: tuple[Any, ...]
    calls: int = 0


@dataclass
class Row:
    """What layers of a kind take together at one side of the feature maps."""

    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass
class Layers:
    """Every call of a layer that is timed alone, found by tracing."""

    found: dict[str, Layer] = field(default_factory=dict)

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Linen's interceptor."""
        module = context.module
        kind = self.kind(module, args)
        if context.method_name == "__call__" and kind is not None:
            alone = module.clone(parent=None, name=None)
            inputs = jax.tree.map(
                lambda leaf: leaf if isinstance(leaf, int) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args
            )
            tokens = args[0].shape
            side = tokens[1] if len(tokens) == 4 else round(tokens[1] ** 0.5)
            layer = self.found.setdefault(f"{alone!r} {inputs}", Layer(kind, side, alone, inputs))
            layer.calls += 1
        return call(*args, **kwargs)

    def kind(self, module: nn.Module, args: tuple[Any, ...]) -> str | None:
        """What the table calls it; None for what is no layer of its own."""
        if isinstance(module, Attention):
            return "self-attention" if args[1] is None else "cross-attention"
        return _KINDS.get(type(module))


def seconds(run: Callable[[], Any], runs: int) -> float:
    """The median, compiled."""
    jax.block_until_ready(run())
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def random_like(shapes: Any) -> Any:
    """Standard normal numbers a hundredth as large."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.01 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def time_alone(module: nn.Module, inputs: tuple[Any, ...], runs: int) -> tuple[float, float]:
    """Seconds and FLOPs of a call."""
    sizes = [each for each in inputs if isinstance(each, int)]
    shapes = [each for each in inputs if not isinstance(each, int)]

    def apply(variables: Any, *arrays: Any) -> Any:
        return module.apply(variables, *arrays, *sizes)

    variables = jax.eval_shape(lambda *arrays: module.init(jax.random.key(0), *arrays, *sizes), *shapes)
    variables, *arrays = random_like((variables, *shapes))

    def transform(params: Any, *arrays: Any) -> Any:
        return winograd.transformed(module, params, *arrays, *sizes)

    # As the sampler has them, once a picture.
    kernels = jax.jit(transform)(variables["params"], *arrays)
    program = jax.jit(apply)
    took = seconds(lambda: program(variables | {winograd.COLLECTION: kernels}, *arrays), runs)
    return took, flops_of(apply, variables, *arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--side", type=int, default=512, help="of the picture in pixels")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    use_eigen()
    config = sd15(arguments.dtype)
    unet, side = config.unet_model, arguments.side // config.vae.downscale
    inputs = (
        jax.ShapeDtypeStruct((2, side, side, 4), config.compute_dtype),
        jax.ShapeDtypeStruct((2,), jnp.float32),
        jax.ShapeDtypeStruct((2, config.tokens.length, config.unet.cross_attention_dim), config.compute_dtype),
    )
    layers = Layers()
    with nn.intercept_methods(layers):
        jax.eval_shape(unet.init, jax.random.key(0), *inputs)
    rows: dict[tuple[str, int], Row] = {}
    for layer in layers.found.values():
        took, flops = time_alone(layer.module, layer.inputs, arguments.runs)
        row = rows.setdefault((layer.kind, layer.side), Row())
        row.calls += layer.calls
        row.seconds += layer.calls * took
        row.flops += layer.calls * flops
    took, flops = time_alone(unet, inputs, arguments.runs)
    print(f"{jax.local_devices()[0].device_kind}, jax {jax.__version__}, {arguments.dtype}\n")
    print("| layers | side | calls | seconds | share | GFLOP/s |\n|---|---|---|---|---|---|")
    for (kind, at), row in sorted(rows.items(), key=lambda item: -item[1].seconds):
        rate = row.flops / row.seconds / 1e9
        print(f"| {kind} | {at} | {row.calls} | {row.seconds:.3f} | {row.seconds / took:.0%} | {rate:.0f} |")
    print(f"| the whole UNet | {side} | 1 | {took:.3f} | 100% | {flops / took / 1e9:.0f} |")


if __name__ == "__main__":
    main()
