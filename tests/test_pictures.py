"""Whole pictures against those of a PyTorch pipeline (golden file), and the mistakes that they must catch."""

from pathlib import Path

import numpy as np
import pytest

from sdipc_jax import Bundle
from tests.picture_cases import GOLDEN, differences, same, variation, write_picture

PICTURES = np.load(Path(__file__).parent / "golden/pictures.npz")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture(tmp_path_factory.mktemp("picture") / "clouds.png")


def golden(sampler: str) -> np.ndarray:
    return PICTURES[sampler][None] / 255.0


@pytest.mark.parametrize("sampler", GOLDEN)
def test_variations_equal_pytorch(tiny: Bundle, picture: Path, sampler: str) -> None:
    found = variation(tiny, picture, sampler, GOLDEN[sampler])
    assert found.std() > 0.1
    assert same(found, golden(sampler)), differences(found, golden(sampler))


def test_golden_pictures_catch_a_dropped_pndm_step(tiny: Bundle, picture: Path) -> None:
    assert not same(variation(tiny, picture, "pndm", GOLDEN["pndm"], dropped=1), golden("pndm"))


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_golden_pictures_catch_scale_27(tiny: Bundle, picture: Path, sampler: str) -> None:
    assert not same(variation(tiny, picture, sampler, GOLDEN[sampler], scale=27.0), golden(sampler))
