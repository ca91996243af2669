"""Single files and exports: the same pictures as the folder, and as PyTorch from either."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.numpy import load_file, save_file

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.families import SD2, SDXL, Family
from sdipc_jax.checkpoints.save_single import save_single
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


@pytest.mark.parametrize("family", [SD2, SDXL], ids=lambda family: family.name)
def test_pytorch_reads_the_other_families_files(family: Family, tmp_path: Path) -> None:
    """Tensor by tensor what it reads from a folder. It tells SDXL's text encoders by their widths, here the same."""
    bundle = family_bundle(tmp_path / "parts", family)
    sdipc.save(bundle, tmp_path / "folder")
    save_single(bundle, tmp_path / "one.safetensors")
    # As in Stability's files: diffusers takes the width from there.
    projection = {"cond_stage_model.model.text_projection": np.zeros((64, 64), np.float32)} if family is SD2 else {}
    save_file(load_file(tmp_path / "one.safetensors") | projection, tmp_path / "whole.safetensors")
    options: Any = {"config": str(tmp_path / "folder"), "local_files_only": True}
    if family is SD2:
        options |= {"safety_checker": None}
    kind = StableDiffusionPipeline if family is SD2 else StableDiffusionXLPipeline
    found = kind.from_single_file(str(tmp_path / "whole.safetensors"), **options)
    expected = kind.from_pretrained(tmp_path / "folder")
    for part in ("unet", "vae", *(["text_encoder"] if family is SD2 else [])):
        left, right = (getattr(pipeline, part).state_dict() for pipeline in (found, expected))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], rtol=0, atol=0, msg=f"{part}: {name}")


@pytest.mark.skipif("SDIPC_FULL_SIZE" not in os.environ, reason="make parity-full: 10 GiB of memory and minutes")
def test_full_size(tmp_path: Path, measured: Callable[[str, float], float]) -> None:
    """Stable Diffusion 1.5's sizes: fp16 in one file, the same in a folder, and what was rounded to fp16."""
    for what in ("write", "jax", "torch"):
        subprocess.run([sys.executable, "-m", "tests.parity_newest.single_full", what, str(tmp_path)], check=True)
    with np.load(tmp_path / "jax.npz") as found, np.load(tmp_path / "torch.npz") as theirs:
        one, expected = found["one.safetensors"], theirs["one.safetensors"]
        np.testing.assert_array_equal(one, found["pipeline"])
        assert expected.std() > 10
        assert measured("full size, mean difference in 1/255", float(np.abs(one - expected).mean())) <= 0.02
        rounded = float(np.abs(found["exact"] - expected).mean())
        assert measured("full size, what fp16 changes, in 1/255", rounded) <= 1.5
