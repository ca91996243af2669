"""Pictures to start from, against PyTorch's img2img and inpainting pipelines with the posterior's mean."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

import sdipc_jax as sdipc
from tests import start_cases
from tests.parity.picture_oracle import open_pipeline
from tests.parity.sampler_oracle import CLASSES, quiet
from tests.start_cases import GUIDANCE, STEPS, TEXT

MODULES = [f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{name}" for name in ("img2img", "inpaint")]


@pytest.fixture(autouse=True)
def _same_noise() -> Iterator[None]:
    """Noise as ours draws it, first the given one, and latents without noise of the autoencoder's own."""
    key = jax.random.fold_in(jax.random.key(5, impl="threefry2x32"), 0)

    def drawn(count: Iterator[int]) -> Any:
        def randn(shape: Any, **_: object) -> torch.Tensor:
            return torch.tensor(np.asarray(jax.random.normal(jax.random.fold_in(key, next(count)), tuple(shape[1:]))))[
                None
            ]

        return randn

    def latents_of(encoded: Any, *_: object, **__: object) -> torch.Tensor:
        return encoded.latent_dist.mode()

    patches = [mock.patch(f"{module}.retrieve_latents", latents_of) for module in MODULES]
    given = torch.tensor(start_cases.noise())
    patches += [mock.patch(f"{module}.randn_tensor", return_value=given) for module in MODULES]
    patches.append(
        mock.patch("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", drawn(iter(range(1, 99))))
    )
    for patch in patches:
        patch.start()
    yield
    mock.patch.stopall()


@quiet()
@torch.no_grad()
def by_pytorch(folder: Path, kind: Any, sampler: str, **settings: Any) -> np.ndarray:
    pipeline = kind(**open_pipeline(folder).components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = CLASSES[sampler].from_config(pipeline.scheduler.config)
    picture = Image.fromarray(start_cases.picture())
    return pipeline(
        TEXT, image=picture, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np", **settings
    ).images


@pytest.mark.parametrize("sampler, strength", start_cases.CASES)
def test_img2img(tiny_folder: Path, tiny: sdipc.Bundle, sampler: str, strength: float) -> None:
    expected = by_pytorch(tiny_folder, StableDiffusionImg2ImgPipeline, sampler, strength=strength)
    found = start_cases.started(tiny, sampler, strength, masked=False)
    assert expected.std() > 0.05
    assert 255 * np.abs(found - expected).mean() < 0.03


@pytest.mark.parametrize("sampler, strength", start_cases.CASES)
def test_inpainting_by_blending(tiny_folder: Path, tiny: sdipc.Bundle, sampler: str, strength: float) -> None:
    mask = Image.fromarray(255 * start_cases.mask())
    expected = by_pytorch(
        tiny_folder, StableDiffusionInpaintPipeline, sampler, strength=strength, mask_image=mask, height=32, width=32
    )
    found = start_cases.started(tiny, sampler, strength, masked=True)
    assert 255 * np.abs(found - expected).mean() < 0.03


@pytest.fixture(scope="module")
def repainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_cases.write_repainting_checkpoint(tmp_path_factory.mktemp("repainting") / "checkpoint")


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_a_unet_that_was_trained_for_it(repainting: Path, strength: float) -> None:
    mask = Image.fromarray(255 * start_cases.mask())
    expected = by_pytorch(
        repainting, StableDiffusionInpaintPipeline, "ddim", strength=strength, mask_image=mask, height=32, width=32
    )
    found = start_cases.started(sdipc.load(repainting), "ddim", strength, masked=True)
    assert 255 * np.abs(found - expected).mean() < 0.03
