"""Single files and exports: the same pictures as the folder, and as PyTorch from either."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import sdipc_jax as sdipc
from sdipc_jax.cli import main
from tests.single_files import family_bundle

torch.set_num_threads(1)
TEXTS = ["a red cat"]
STEPS, GUIDANCE = 6, 5.0


def latents() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((1, 4, 16, 16), np.float32)


def ours(path: Path) -> np.ndarray:
    """A picture of a text, in levels."""
    bundle = sdipc.load(path)
    context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, TEXTS))
    settings = {"steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "ddim", "height": 32, "width": 32}
    return 255 * np.asarray(sdipc.generate(bundle, context, seeds=0, latents=latents(), **settings))


@torch.no_grad()
def theirs(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """The same picture by PyTorch."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 32, "width": 32}
    return 255 * pipeline(TEXTS, latents=torch.tensor(latents()), output_type="np", **settings).images


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, and what the command makes of it."""
    root = tmp_path_factory.mktemp("files")
    sdipc.save(family_bundle(root / "parts"), root / "folder")
    for name, dtype in (("one.safetensors", "float32"), ("half.safetensors", "float16"), ("again", "float32")):
        output = ["--output", str(root / name), "--dtype", dtype]
        assert main(["export", "--model", str(root / "folder"), *output, "--quiet"]) == 0
    return root


@pytest.fixture(scope="module")
def expected(files: Path) -> np.ndarray:
    picture = theirs(StableDiffusionPipeline.from_pretrained(files / "folder"))
    assert picture.std() > 10
    return picture


def test_a_single_file_equals_the_folder_and_pytorch(
    files: Path, expected: np.ndarray, measured: Callable[[str, float], float]
) -> None:
    found = ours(files / "one.safetensors")
    np.testing.assert_array_equal(found, ours(files / "folder"))
    assert measured("single file, mean difference in 1/255", float(np.abs(found - expected).mean())) <= 0.02


def test_half_precision(files: Path, expected: np.ndarray, measured: Callable[[str, float], float]) -> None:
    found = ours(files / "half.safetensors")
    assert measured("fp16 file, mean difference in 1/255", float(np.abs(found - expected).mean())) <= 1.5


def test_pytorch_opens_what_is_exported(files: Path, expected: np.ndarray) -> None:
    again = theirs(StableDiffusionPipeline.from_pretrained(files / "again"))
    np.testing.assert_array_equal(again, expected)
    single = StableDiffusionPipeline.from_single_file(
        str(files / "one.safetensors"), config=str(files / "folder"), local_files_only=True
    )
    np.testing.assert_array_equal(theirs(single), expected)
