"""Whole pictures of SDXL and SD 2.1 in miniature by PyTorch's diffusers; any version since 0.39."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from tests.sdxl_cases import GUIDANCE, PICTURES, STEPS

torch.set_grad_enabled(False)
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd2": StableDiffusionPipeline}


def make(folder: Path, name: str) -> np.ndarray:
    """The pictures, by a pipeline of the checkpoint's own class."""
    family, asked = name.split("/")[0], PICTURES[name]
    options: dict[str, Any] = {"add_watermarker": False} if family == "sdxl" else {"safety_checker": None}
    pipeline: Any = PIPELINES[family].from_pretrained(folder / family, **options)
    pipeline.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    if asked.original is not None:
        more = {"original_size": asked.original, "crops_coords_top_left": asked.crop, "target_size": asked.target}
    if asked.negative_original is not None:
        more |= {"negative_original_size": asked.negative_original, "negative_target_size": asked.target}
    negative = None if asked.negative is None else [asked.negative] * len(asked.texts)
    return pipeline(
        list(asked.texts), negative_prompt=negative, latents=torch.tensor(asked.latents), height=asked.size[0],
        width=asked.size[1], num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np", **more,
    ).images  # fmt: skip


def golden_families(folder: Path) -> dict[str, np.ndarray]:
    """What the golden file holds."""
    return {name: make(folder, name) for name in PICTURES}
