"""Whole pictures of SDXL, its few-step relatives and SD 2.1 in miniature by diffusers, any version since 0.39."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from tests.sdxl_cases import FEW_STEPS, PICTURES

torch.set_grad_enabled(False)
STOCHASTIC = ("scheduling_euler_ancestral_discrete", "scheduling_lcm")


def make(folder: Path, name: str) -> np.ndarray:
    """The pictures, by a pipeline of the checkpoint's own class, with the fresh noise that ours draws."""
    family, asked = name.split("/")[0], (PICTURES | FEW_STEPS)[name]
    pipeline = open_pipeline(folder / family)
    pipeline.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    if asked.original is not None:
        more = {"original_size": asked.original, "crops_coords_top_left": asked.crop, "target_size": asked.target}
    if asked.negative_original is not None:
        more |= {"negative_original_size": asked.negative_original, "negative_target_size": asked.target}
    negative = None if asked.negative is None else [asked.negative] * len(asked.texts)
    step = 0

    def noise(shape: tuple[int, ...], **_: object) -> torch.Tensor:
        nonlocal step
        step += 1
        keys = [jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 0) for seed in range(len(asked.texts))]
        drawn = [jax.random.normal(jax.random.fold_in(key, step), tuple(shape[1:])) for key in keys]
        return torch.tensor(np.stack(drawn))

    with ExitStack() as patches:
        for module in STOCHASTIC:
            patches.enter_context(mock.patch(f"diffusers.schedulers.{module}.randn_tensor", noise))
        return pipeline(
            list(asked.texts), negative_prompt=negative, latents=torch.tensor(asked.latents), height=asked.size[0],
            width=asked.size[1], num_inference_steps=asked.steps, guidance_scale=asked.guidance, output_type="np",
            **more,
        ).images  # fmt: skip


def open_pipeline(folder: Path) -> Any:
    """The pipeline of a folder of `tests.sdxl_cases`."""
    if folder.name == "sd2":
        return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def golden_families(folder: Path) -> dict[str, np.ndarray]:
    """What the golden file holds."""
    return {name: make(folder, name) for name in PICTURES}
