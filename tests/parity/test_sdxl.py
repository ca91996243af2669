"""Whole pictures of SDXL and SD 2.1 in miniature against PyTorch, with this and with newer releases of diffusers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import sdxl_cases
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


def test_golden_file_is_current(folder: Path) -> None:
    with np.load(Path(__file__).parents[1] / "golden/families.npz") as saved:
        for name, expected in sdxl_oracle.golden_families(folder).items():
            assert np.abs(saved[name] - expected).mean() <= 0.01 / 255, name
