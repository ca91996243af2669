"""Preprocessing against transformers' CLIPImageProcessor, the one that resizes with Pillow."""

from typing import Any

import numpy as np
import pytest
from transformers import CLIPImageProcessor

from sdipc_jax.pictures.preprocessing import Preprocessing, preprocess

SIZES = [(224, 224), (640, 480), (333, 517), (31, 1000), (16, 16), (225, 223), (100, 37)]
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "integers": {"size": 33, "crop_size": 30},
    "padded": {"size": {"shortest_edge": 20}, "crop_size": {"height": 41, "width": 28}},
    "uncropped": {"size": {"height": 37, "width": 50}, "do_center_crop": False},
    "unresized": {"do_resize": False, "crop_size": 101},
    "lanczos": {"resample": 1, "size": 50, "crop_size": 47, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
    "bilinear": {"resample": 2, "size": 17, "crop_size": 17, "rescale_factor": 0.0078, "image_mean": 1.0},
    "nearest": {"resample": 0, "size": 64, "crop_size": 64, "do_normalize": False},
    "levels": {"resample": 4, "size": 64, "crop_size": 63, "do_rescale": False},
    "untouched": {"resample": 5, "size": 64, "crop_size": 64, "do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("height, width", SIZES)
def test_preprocess_equals_transformers(values: dict[str, Any], height: int, width: int) -> None:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    reference = CLIPImageProcessor(**values)(pixels, input_data_format="channels_last")["pixel_values"][0]
    settings = Preprocessing.from_json(values, "here")
    found = preprocess(pixels, settings)
    assert found.shape[:2] == settings.output_size
    np.testing.assert_array_equal(found.transpose(2, 0, 1), reference.astype(np.float32))


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS.keys())
def test_both_read_what_the_other_writes(values: dict[str, Any]) -> None:
    settings = Preprocessing.from_json(values, "here")
    assert Preprocessing.from_json(CLIPImageProcessor(**values).to_dict(), "here") == settings
    ours = CLIPImageProcessor.from_dict(settings.to_json())
    assert Preprocessing.from_json(ours.to_dict(), "here") == settings
