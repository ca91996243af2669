"""Run with 8 CPU devices: samples on some of them and prints what came out, as JSON.

python -m tests.eight_devices 1 2 8
"""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdipc_jax as sdipc
from sdipc_jax import parallel
from sdipc_jax.parallel.sampling import _divided, advance_on, finish_on
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from tests.tiny import quick_unet, tiny_bundle

COLLECTIVES = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
SETTINGS: dict[str, Any] = {"steps": 2, "sampler": "pndm"}
INTERVAL = (0.0, 0.6)


def measured(bundle: sdipc.Bundle, context: jax.Array, size: int) -> dict[str, Any]:
    """The programs for the same batch on the first devices: FLOPs of each device, and collectives."""
    mesh = parallel.make_mesh(f"data={size}")
    request, state = begin(bundle, context, seeds=0, **SETTINGS)
    if size == 1:
        lowered = [advance.lower(bundle, request, state, 0, 2), finish.lower(bundle, state)]
    else:
        whole, parts, state = parallel.replicate(mesh, bundle), _divided(mesh, request), parallel.place(mesh, state)
        lowered = [advance_on.lower(mesh, whole, parts, state, 0, 2), finish_on.lower(mesh, whole, state)]
    compiled = [each.compile() for each in lowered]
    return {
        "flops": [each.cost_analysis()["flops"] for each in compiled],
        "collectives": [len(re.findall(COLLECTIVES, each.as_text())) for each in compiled],
    }


def small_bundle(folder: Path) -> sdipc.Bundle:
    """A checkpoint that compiles in a few seconds: latents are as large as pictures, 8 by 8."""
    config = tiny_bundle(folder / "parts").config
    sides = {"height": 8, "width": 8}
    vae = {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",)}
    return tiny_bundle(
        folder,
        unet=quick_unet(config.unet),
        vae=dataclasses.replace(config.vae, **vae, up_block_types=("UpDecoderBlock2D",)),
        defaults=config.defaults.model_copy(update=sides),
    )


def main(folder: Path, sizes: list[int]) -> None:
    bundle = small_bundle(folder)
    length, width = bundle.config.tokens.length, bundle.config.unet.cross_attention_dim
    context = jnp.asarray(np.random.default_rng(0).standard_normal((8, length, width), np.float32))
    found: dict[str, Any] = {"devices": jax.device_count(), "programs": {}, "pictures": {}, "cached": {}}
    for size in sizes:
        found["programs"][size] = measured(bundle, context, size)
        # 7 are filled up to 8, but on one device.
        mesh, batch = parallel.make_mesh(f"data={size}"), context[: 7 if size > 1 else 8]
        settings = {"seeds": 3, "indices": np.arange(len(batch)), **SETTINGS}
        for name, choice in (("pictures", {"guidance_interval": INTERVAL}), ("cached", {"cache_interval": 2})):
            pictures, _ = parallel.generate(mesh, bundle, batch, **settings, **choice)
            found[name][size] = np.asarray(pictures).tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary), [int(size) for size in sys.argv[1:]])
