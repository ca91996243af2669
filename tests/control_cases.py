"""ControlNets with random weights, for the comparison with PyTorch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.control_side import ControlSide
from sdipc_jax.checkpoints.keys import flatten, to_torch, torch_name
from sdipc_jax.models import ControlNetConfig
from sdipc_jax.sampling import Control
from tests import start_cases
from tests.random_weights import random_tree

STEPS, GUIDANCE, TEXT = 10, 4.0, "a red cat"
# One network at all steps and in the middle, and two with intervals that overlap.
CASES: dict[str, tuple[dict[str, float], ...]] = {
    "one": ({"scale": 0.7},),
    "one, in the middle": ({"scale": 1.0, "start": 0.2, "end": 0.7},),
    "two": ({"scale": 0.5, "start": 0.0, "end": 0.6}, {"scale": -0.3, "start": 0.4, "end": 1.0}),
}


def picture(place: int) -> np.ndarray:
    """What the network at a place is shown, (32, 32, 3) in 8 bits."""
    lines = (np.add.outer(np.arange(32) * (place + 1), np.arange(32)) % 8 < 2) * 255
    return np.stack([lines, np.roll(lines, 3, 0), lines.T], axis=-1).astype(np.uint8)


def random_network(config: Config, seed: int, **changes: Any) -> tuple[ControlNetConfig, dict[str, np.ndarray]]:
    """A network beside a checkpoint's UNet, with its weights under diffusers' names."""
    widths = tuple(4 * (2 + level) for level in range(len(config.vae.block_out_channels)))
    options = {"in_channels": config.vae.latent_channels, "conditioning_embedding_out_channels": widths}
    network = ControlNetConfig.beside(config.unet, **options | changes)
    beside = dataclasses.replace(config, controlnets=(ControlSide(network, ()),))
    params = random_tree(beside.abstract_params()["controlnets"]["0"], seed)
    return network, {
        torch_name(path): np.ascontiguousarray(to_torch(path, leaf)) for path, leaf in flatten(params).items()
    }


def write_controlnet(folder: Path, config: Config, seed: int = 0, **changes: Any) -> Path:
    """A folder that diffusers opens."""
    network, weights = random_network(config, seed, **changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(network.to_json() | {"_class_name": "ControlNetModel"}))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def controlled(bundle: sdipc.Bundle, case: str, **settings: Any) -> np.ndarray:
    """What becomes of a text, (1, 32, 32, 3)."""
    controls = [Control(picture(place)[None] / np.float32(255), **each) for place, each in enumerate(CASES[case])]
    context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, [TEXT]))
    options = {"steps": STEPS, "guidance_scale": GUIDANCE, "latents": start_cases.noise(), "seeds": 5}
    return np.asarray(sdipc.generate(bundle, context, **{"controls": controls} | options | settings))
