"""SDXL's UNet at full size, one framework a process: 10.3 GB of float32 weights are enough for one.

python -m tests.parity.sdxl_full torch|jax FILE.npy
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from sdipc_jax.checkpoints.keys import flatten, to_torch, torch_name, unflatten
from sdipc_jax.models import UNet2DConditionModel, UNetConfig
from sdipc_jax.models.given import shapes

SDXL_UNET = UNetConfig(
    sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def inputs() -> dict[str, np.ndarray]:
    """Latents of 128 x 128, a timestep, a prompt, and what is added."""
    generator = np.random.default_rng(0)
    return {
        "sample": generator.standard_normal((1, 128, 128, 4), np.float32),
        "timesteps": np.array([601.0], np.float32),
        "context": generator.standard_normal((1, 77, 2048), np.float32),
        "text_embeds": generator.standard_normal((1, 1280), np.float32),
        "time_ids": np.array([[1024, 1024, 0, 0, 1024, 1024]], np.float32),
    }


def leaves() -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Random weights as `random_weights.random_tree` scales them, a leaf at a time."""
    described: Any = {name: (array.shape, "float32") for name, array in inputs().items()}
    tree = shapes(UNet2DConditionModel(SDXL_UNET), **described)
    generator = np.random.default_rng(1)
    for path, leaf in flatten(tree).items():
        noise = generator.standard_normal(leaf.shape, np.float32)
        if path[-1] == "kernel":
            noise /= np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        else:
            noise *= np.float32(0.2)
        yield path, noise + np.float32(path[-1] == "scale")


def by_torch() -> np.ndarray:
    """What diffusers gives."""
    import torch
    from diffusers import UNet2DConditionModel as Reference

    from tests.parity.oracle import nchw, nhwc, options

    torch.set_num_threads(os.cpu_count() or 1)
    with torch.device("meta"):
        model = Reference(**options(SDXL_UNET))
    model = model.to_empty(device="cpu").eval()
    parameters = dict(model.named_parameters())
    for path, leaf in leaves():
        parameters.pop(torch_name(path)).copy_(torch.from_numpy(np.ascontiguousarray(to_torch(path, leaf))))
    assert not parameters
    given = inputs()
    added = {name: torch.tensor(given[name]) for name in ("text_embeds", "time_ids")}
    states = torch.tensor(given["timesteps"]), torch.tensor(given["context"])
    return nhwc(model(nchw(given["sample"]), *states, added_cond_kwargs=added).sample)


def by_jax() -> np.ndarray:
    """What this package gives."""
    import jax
    import jax.numpy as jnp

    params = unflatten({path: jax.block_until_ready(jnp.asarray(leaf)) for path, leaf in leaves()})
    return np.asarray(jax.jit(UNet2DConditionModel(SDXL_UNET).apply)({"params": params}, **inputs()))


if __name__ == "__main__":
    np.save(sys.argv[2], {"torch": by_torch, "jax": by_jax}[sys.argv[1]]())
