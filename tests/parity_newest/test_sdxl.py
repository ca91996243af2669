"""SDXL and SD 2.1 in miniature with the newest diffusers: whole pictures, and prompts that its pipelines take."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sdipc_jax as sdipc
from sdipc_jax.commands.prompt import embeds
from tests import sdxl_cases
from tests.parity import sdxl_oracle
from tests.sdxl_cases import GUIDANCE, STEPS

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_cases.write_checkpoints(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", sdxl_cases.PICTURES)
def test_pictures_equal_pytorch(folder: Path, name: str) -> None:
    difference = 255 * np.abs(sdxl_cases.make(folder, name) - sdxl_oracle.make(folder, name))
    assert difference.mean() <= 0.01


def test_diffusers_takes_the_arrays_of_a_prompt_file(folder: Path) -> None:
    bundle = sdxl_cases.bundle_of(folder / "sdxl")
    vectors = np.random.default_rng(0).standard_normal((2, 24 + 40 + 32), np.float32)
    prompt, negative = sdipc.image_prompt(bundle, vectors), sdipc.negative_prompt(bundle)
    latents = np.random.default_rng(1).standard_normal((2, 4, 8, 8), np.float32)
    found = sdipc.generate(
        bundle, prompt, seeds=0, latents=latents, steps=STEPS, guidance_scale=GUIDANCE, sampler="euler"
    )
    arrays = {name: torch.tensor(array) for name, array in embeds(prompt, negative).items()}
    pipeline = sdxl_oracle.open_pipeline(folder / "sdxl")
    expected = pipeline(
        **arrays, latents=torch.tensor(latents), num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=32,
        width=32, output_type="np",
    ).images  # fmt: skip
    assert 255 * np.abs(np.asarray(found) - expected).mean() <= 0.01
