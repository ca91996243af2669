"""ControlNets, against PyTorch's: the network's residuals, and whole pictures of diffusers' pipelines."""

from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import apply
from sdipc_jax.sampling import start_from
from sdipc_jax.sampling.control import embed_control
from tests import sdxl_cases, start_cases
from tests.control_cases import CASES, GUIDANCE, STEPS, TEXT, controlled, picture, write_controlnet
from tests.parity.oracle import nchw, nhwc
from tests.parity.picture_oracle import open_pipeline
from tests.parity.sampler_oracle import CLASSES, quiet

IMG2IMG = "diffusers.pipelines.controlnet.pipeline_controlnet_img2img"


@pytest.fixture(scope="module")
def folders(tiny: sdipc.Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("networks")
    return [write_controlnet(parent / str(seed), tiny.config, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def bundles(tiny: sdipc.Bundle, folders: list[Path]) -> dict[int, sdipc.Bundle]:
    one = sdipc.add_controlnet(tiny, folders[0])
    return {1: one, 2: sdipc.add_controlnet(one, folders[1])}


def shares(each: list[dict[str, Any]]) -> dict[str, Any]:
    """How much and when each network counts, as diffusers calls it."""
    return {
        "controlnet_conditioning_scale": [one["scale"] for one in each],
        "control_guidance_start": [one.get("start", 0.0) for one in each],
        "control_guidance_end": [one.get("end", 1.0) for one in each],
    }


@quiet()
@torch.no_grad()
def by_pytorch(tiny_folder: Path, folders: list[Path], kind: Any, case: str, sampler: str, **settings: Any) -> Any:
    each = CASES[case]
    networks = [ControlNetModel.from_pretrained(folder) for folder in folders[: len(each)]]
    parts = open_pipeline(tiny_folder).components
    pipeline = kind(**parts, controlnet=networks, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = CLASSES[sampler].from_config(pipeline.scheduler.config)
    shown = [Image.fromarray(picture(place)) for place in range(len(each))]
    settings |= {"control_image" if kind is StableDiffusionControlNetImg2ImgPipeline else "image": shown}
    return pipeline(
        TEXT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        **shares(each),
        output_type="np",
        **settings,
    ).images


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_pool_conditions": True},
        {"controlnet_conditioning_channel_order": "bgr"},
        {"down_block_types": ("DownBlock2D", "DownBlock2D"), "mid_block_type": "UNetMidBlock2D"},
    ],
    ids=["plain", "pooled", "bgr", "without attention"],
)
@torch.no_grad()
def test_residuals(tiny: sdipc.Bundle, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_controlnet(tmp_path / "network", tiny.config, **changes)
    bundle = sdipc.add_controlnet(tiny, folder)
    generator = np.random.default_rng(0)
    # An odd size, whose halves do not come back by doubling.
    pictures = generator.random((2, 36, 44, 3), np.float32)
    sample = generator.standard_normal((2, 9, 11, 4), np.float32)
    timesteps = np.array([3.0, 741.0], np.float32)
    context = generator.standard_normal((2, 20, 24), np.float32)
    hint = embed_control(bundle, 0, pictures)
    params = bundle.params["controlnets"]["0"]
    found = apply(bundle.config.controlnets[0].model(jnp.float32), params, sample, timesteps, context, hint)
    network = ControlNetModel.from_pretrained(folder)
    inputs = nchw(sample), torch.tensor(timesteps), torch.tensor(context), nchw(pictures)
    skips, middle = network(*inputs, return_dict=False)
    for ours, theirs in zip(found, [*skips, middle], strict=True):
        expected = nhwc(theirs)
        assert expected.std() > 0.1
        np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case, sampler", [*((case, "ddim") for case in CASES), ("two", "pndm"), ("two", "dpm++2m")])
def test_pictures(
    tiny_folder: Path, bundles: dict[int, sdipc.Bundle], folders: list[Path], case: str, sampler: str
) -> None:
    latents = torch.tensor(start_cases.noise())
    expected = by_pytorch(tiny_folder, folders, StableDiffusionControlNetPipeline, case, sampler, latents=latents)
    found = controlled(bundles[len(CASES[case])], case, sampler=sampler)
    assert expected.std() > 0.05
    assert 255 * np.abs(found - expected).mean() < 0.03
    without = controlled(bundles[1], "one", sampler="ddim")
    assert case == "one" or 255 * np.abs(without - expected).mean() > 1


@pytest.mark.parametrize("case, strength", [("one, in the middle", 0.6), ("two", 0.6)])
def test_with_a_picture_to_start_from(
    tiny_folder: Path, bundles: dict[int, sdipc.Bundle], folders: list[Path], case: str, strength: float
) -> None:
    original = Image.fromarray(start_cases.picture())
    noise = torch.tensor(start_cases.noise())
    with (
        mock.patch(f"{IMG2IMG}.retrieve_latents", lambda encoded, *_, **__: encoded.latent_dist.mode()),
        mock.patch(f"{IMG2IMG}.randn_tensor", return_value=noise),
    ):
        expected = by_pytorch(
            tiny_folder,
            folders,
            StableDiffusionControlNetImg2ImgPipeline,
            case,
            "ddim",
            image=original,
            strength=strength,
        )
    bundle = bundles[len(CASES[case])]
    start = start_from(bundle, start_cases.picture()[None] / np.float32(255), strength)
    found = controlled(bundle, case, sampler="ddim", start=start)
    assert 255 * np.abs(found - expected).mean() < 0.03


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_cases.write_sdxl(tmp_path_factory.mktemp("sdxl") / "checkpoint")


@pytest.mark.parametrize("case", ["one, in the middle", "two"])
@quiet()
@torch.no_grad()
def test_sdxl(sdxl: Path, tmp_path: Path, case: str) -> None:
    """Networks that read a pooled text and sizes too."""
    each, bundle = CASES[case], sdipc.load(sdxl)
    folders = [write_controlnet(tmp_path / str(place), bundle.config, place) for place in range(len(each))]
    for folder in folders:
        bundle = sdipc.add_controlnet(bundle, folder)
    networks: Any = [ControlNetModel.from_pretrained(folder) for folder in folders]
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(sdxl, controlnet=networks, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        TEXT,
        image=[Image.fromarray(picture(place)) for place in range(len(each))],
        latents=torch.tensor(start_cases.noise()),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        **shares(each),
        output_type="np",
    ).images
    assert expected.std() > 0.05
    assert 255 * np.abs(controlled(bundle, case, sampler="euler") - expected).mean() < 0.03
    without = controlled(bundle, case, sampler="euler", controls=[])
    assert 255 * np.abs(without - expected).mean() > 1
