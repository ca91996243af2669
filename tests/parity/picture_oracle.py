"""Whole pictures by PyTorch, from a checkpoint folder alone."""

from pathlib import Path
from unittest import mock

import jax
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from tests.parity import oracle  # noqa: F401  (sets PyTorch's threads)
from tests.parity.sampler_oracle import CLASSES, quiet
from tests.picture_cases import GOLDEN, GUIDANCE, NEGATIVE, SCALE, SEED, STEPS, latents_of


def open_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline of a folder, without a progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_states(pipeline: StableDiffusionPipeline, text: str) -> torch.Tensor:
    """What the UNet reads of a text, (1, L, D)."""
    tokens = pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    return pipeline.text_encoder(tokens).last_hidden_state


def picture_prompt(folder: Path, pipeline: StableDiffusionPipeline, picture: Path, scale: float) -> torch.Tensor:
    """Eqs. 6 and 7, (1, L, D)."""
    clip = CLIPModel.from_pretrained(folder / "clip")
    pixels = CLIPImageProcessor.from_pretrained(folder / "clip")(Image.open(picture), return_tensors="pt").pixel_values
    joint = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    inverse = torch.linalg.pinv(clip.text_projection.weight.double(), atol=0.3, rtol=0).float()
    state = inverse @ joint[0]
    empty = text_states(pipeline, "")
    vector = scale * state / state.norm()
    return torch.cat([empty[0, :1], vector.expand(empty.shape[1] - 1, -1)])[None]


@quiet()
@torch.no_grad()
def variation(
    folder: Path, pipeline: StableDiffusionPipeline, picture: Path, sampler: str, size: tuple[int, int]
) -> np.ndarray:
    """A variation of a picture in [0, 1], (1, H, W, 3), with the noise that ours draws."""
    height, width = size
    pipeline.scheduler = CLASSES[sampler].from_config(pipeline.scheduler.config)
    key = jax.random.fold_in(jax.random.key(SEED, impl="threefry2x32"), 0)
    steps = iter(range(1, 1000))

    def noise(shape: tuple[int, ...], **_: object) -> torch.Tensor:
        drawn = jax.random.normal(jax.random.fold_in(key, next(steps)), tuple(shape[1:]))
        return torch.tensor(np.asarray(drawn))[None]

    with mock.patch("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", noise):
        return pipeline(
            prompt_embeds=picture_prompt(folder, pipeline, picture, SCALE),
            negative_prompt_embeds=text_states(pipeline, NEGATIVE),
            latents=torch.tensor(latents_of(height, width)),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=height,
            width=width,
            output_type="np",
        ).images


def golden_pictures(folder: Path, picture: Path) -> dict[str, np.ndarray]:
    """The golden file's pictures, (H, W, 3) in 8 bits."""
    pipeline = open_pipeline(folder)
    return {
        sampler: np.round(255 * variation(folder, pipeline, picture, sampler, size)[0]).astype(np.uint8)
        for sampler, size in GOLDEN.items()
    }
