"""What each further prompt of a picture costs: seconds of an evaluation of the UNet with one to four prompts.

    python scripts/measure_contexts.py --model embedded --batch 4
    python scripts/measure_contexts.py --model sd15 --runs 3

Weights of `sd15` are random. Without guidance; every evaluation in its turn, so that what else the machine does is
shared out. On an idle machine; sizes of Stable Diffusion 1.5 take 8 GiB.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.jax_side import bundle_for
from benchmarks.work import Work

from sdipc_jax.compilation import use_eigen
from sdipc_jax.models.weighted import cross_attention_layers
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin

MOST = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["embedded", "sd15"], default="embedded")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    use_eigen()
    bundle = bundle_for(Work("unet", arguments.model, arguments.batch))
    config = bundle.config
    shape = arguments.batch, MOST, config.tokens.length, config.unet.cross_attention_dim
    contexts = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    size = config.latent_shape(config.defaults.height, config.defaults.width)[1:]
    layers = len(cross_attention_layers(config.unet))
    masks = np.random.default_rng(1).uniform(0, 1, (1, 2, layers, 2, *size)).astype(np.float32)
    cases: dict[str, tuple[int, Any]] = {f"{count}": (count, None) for count in range(1, MOST + 1)}
    cases["2, with a mask in each layer and step"] = (2, masks)
    kernels: Any = None
    ready = {}
    for name, (count, weights) in cases.items():
        context = contexts[:, 0] if count == 1 else contexts[:, :count]
        options: dict[str, Any] = {"negative": contexts[:1, 0], "guidance_scale": 1.0, "steps": 2, "sampler": "ddim"}
        request, state = begin(bundle, context, weights=weights, seeds=0, **options)
        kernels = request.winograd if kernels is None else kernels
        request = dataclasses.replace(request, winograd=kernels)
        jax.block_until_ready(advance(bundle, request, state, 0, 1))
        ready[name] = request, state
    taken: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(arguments.runs):
        for name, (request, state) in ready.items():
            started = time.perf_counter()
            jax.block_until_ready(advance(bundle, request, state, 0, 1))
            taken[name].append(time.perf_counter() - started)
    print(f"{arguments.model}, batch {arguments.batch}, {arguments.runs} runs, jax {jax.__version__}\n")
    print("| prompts | s, median | s, least and most | of one prompt's |\n|---|---|---|---|")
    one = statistics.median(taken["1"])
    for name, each in taken.items():
        found = statistics.median(each)
        print(f"| {name} | {found:.4f} | {min(each):.4f} to {max(each):.4f} | {found / one:.3f} |")


if __name__ == "__main__":
    main()
