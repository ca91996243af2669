"""Whole pictures of SDXL, its few-step relatives and SD 2.1 in miniature against PyTorch, with any diffusers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import sdxl_cases
from tests.compare import relative_error
from tests.parity import sdxl_oracle

Measured = Callable[[str, float], float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_cases.write_checkpoints(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", sdxl_cases.PICTURES)
def test_pictures_equal_pytorch(folder: Path, name: str, measured: Measured) -> None:
    expected = sdxl_oracle.make(folder, name)
    assert expected.std() > 0.1
    difference = 255 * np.abs(sdxl_cases.make(folder, name) - expected)
    assert measured(f"{name}, mean difference in 1/255", float(difference.mean())) <= 0.01


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_cases.write_few_steps(tmp_path_factory.mktemp("few"))


@pytest.mark.parametrize("name", sdxl_cases.FEW_STEPS)
def test_pictures_of_few_steps_equal_pytorch(few: Path, name: str, measured: Measured) -> None:
    expected = sdxl_oracle.make(few, name)
    assert expected.std() > 0.05
    difference = 255 * np.abs(sdxl_cases.make(few, name) - expected)
    assert measured(f"{name}, mean difference in 1/255", float(difference.mean())) <= 0.01


@pytest.mark.full_size
@pytest.mark.skipif("SDIPC_FULL_SIZE" not in os.environ, reason="make parity-full: 14 GiB of memory and minutes")
def test_full_size_unet(tmp_path: Path, measured: Measured) -> None:
    for framework in ("torch", "jax"):
        command = [sys.executable, "-m", "tests.parity.sdxl_full", framework, str(tmp_path / f"{framework}.npy")]
        subprocess.run(command, check=True)
    found, expected = (np.load(tmp_path / f"{framework}.npy") for framework in ("jax", "torch"))
    assert measured("SDXL UNet at 128 x 128", relative_error(found, expected)) <= 1e-4


def test_golden_file_is_current(folder: Path) -> None:
    with np.load(Path(__file__).parents[1] / "golden/families.npz") as saved:
        for name, expected in sdxl_oracle.golden_families(folder).items():
            assert np.abs(saved[name] - expected).mean() <= 0.01 / 255, name
