"""A checkpoint in memory: what is traced, what is static, what is refused."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdipc_jax import Bundle, InputError, closed_form, encode_images, load, read_pictures
from sdipc_jax.checkpoints.bundle import SafetySide
from sdipc_jax.models import CLIPVisionConfig
from sdipc_jax.pictures.preprocessing import Preprocessing
from tests.compare import relative_error


def test_importing_starts_no_backend_and_nothing_heavy() -> None:
    program = """
import sys
import jax
from sdipc_jax import *
loaded = {"torch", "transformers", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
# Refused once there is a backend.
jax.config.update("jax_num_cpu_devices", 3)
assert jax.local_device_count("cpu") == 3
try:
    jax.config.update("jax_num_cpu_devices", 2)
except RuntimeError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_leaves_are_the_parameters_and_the_rest_is_static(tiny: Bundle) -> None:
    leaves, structure = jax.tree.flatten(tiny)
    expected = jax.tree.leaves(tiny.params)
    assert len(leaves) == len(expected) > 100
    assert all(a is b for a, b in zip(leaves, expected, strict=True))
    assert jax.tree.unflatten(structure, leaves).config == tiny.config


def test_parameters_are_what_the_configuration_asks_for(tiny: Bundle) -> None:
    expected = tiny.config.abstract_params()
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tiny.params)
    assert found == expected
    assert set(expected) == {"unet", "vae", "text_encoder", "clip"}


def test_loading_again_compiles_nothing(tiny: Bundle, tiny_folder: Path) -> None:
    again = load(str(tiny_folder))
    assert again.config == tiny.config
    assert hash(again.config) == hash(tiny.config)
    pixels = jnp.zeros((1, 28, 28, 3))
    expected = encode_images(tiny, pixels)
    programs = encode_images._cache_size()
    np.testing.assert_array_equal(encode_images(again, pixels), expected)
    assert encode_images._cache_size() == programs


def test_bfloat16_keeps_the_projections_in_float32(tiny: Bundle, tiny_folder: Path) -> None:
    half = load(tiny_folder, dtype="bfloat16")
    dtypes = {name: {leaf.dtype.name for leaf in jax.tree.leaves(part)} for name, part in half.params.items()}
    assert dtypes["unet"] == dtypes["vae"] == dtypes["text_encoder"] == {"bfloat16"}
    assert half.params["clip"]["vision_model"]["pre_layrnorm"]["scale"].dtype == jnp.bfloat16
    for name in ("visual_projection", "text_projection"):
        np.testing.assert_array_equal(half.params["clip"][name]["kernel"], tiny.params["clip"][name]["kernel"])
    converter, exact = closed_form(half, scale=1.0), closed_form(tiny, scale=1.0)
    np.testing.assert_array_equal(converter.inverse, exact.inverse)
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 28, 28, 3), np.float32))
    features = encode_images(half, pixels)
    assert features.dtype == jnp.float32
    assert 1e-4 < relative_error(features, encode_images(tiny, pixels)) < 0.05


def test_pictures_are_read_as_the_vision_tower_wants_them(tiny: Bundle, tmp_path: Path) -> None:
    grey, size = np.full((40, 60, 3), 128, np.uint8), tiny.config.vision_side.preprocessing
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.zeros_like(grey)).save(tmp_path / "black.png")
    pixels = read_pictures(tiny, [tmp_path / "grey.png", str(tmp_path / "black.png")])
    assert pixels.shape == (2, 28, 28, 3)
    assert pixels.dtype == np.float32
    for picture, level in zip(pixels, (128 / 255, 0), strict=True):
        expected = (level - np.array(size.image_mean)) / np.array(size.image_std)
        np.testing.assert_allclose(picture, np.broadcast_to(expected, picture.shape), rtol=1e-5)


def test_features_do_not_depend_on_the_batch(tiny: Bundle) -> None:
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((3, 28, 28, 3), np.float32))
    together = encode_images(tiny, pixels)
    assert together.shape == (3, 32)
    assert relative_error(encode_images(tiny, pixels[1:2])[0], together[1]) <= 1e-5
    mapped = jax.vmap(encode_images, in_axes=(None, 0))(tiny, pixels[:, None])
    assert relative_error(mapped[:, 0], together) <= 1e-5
    assert relative_error(together[0], together[1]) > 0.01


def test_many_pictures_are_encoded_in_parts(tiny: Bundle) -> None:
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((37, 28, 28, 3), np.float32))
    found = encode_images(tiny, pixels)
    expected = jnp.concatenate([encode_images(tiny, pixels[i : i + 1]) for i in range(37)])
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("paths", [[], "cat.png", Path("cat.png")])
def test_no_list_of_pictures_is_refused(tiny: Bundle, paths: Any) -> None:
    with pytest.raises(InputError, match=r"^paths is .+, expected a list of at least one file: put it in brackets$"):
        read_pictures(tiny, paths)


@pytest.mark.parametrize(
    "height, width, message",
    [
        (33, 32, "height is 33, expected a multiple of 4: try 32"),
        (32, 31, "width is 31, expected a multiple of 4: try 32"),
        (1, 32, "height is 1, expected a multiple of 4: try 4"),
        (-4, 32, "height is -4, expected a multiple of 4: try 4"),
    ],
)
def test_sizes(tiny: Bundle, height: int, width: int, message: str) -> None:
    assert tiny.config.latent_shape(28, 4) == (4, 7, 1)
    with pytest.raises(InputError, match=f"^{message}$"):
        tiny.config.latent_shape(height, width)


def test_no_clip_or_a_deeper_one_is_refused_where_pictures_are_prompts(tiny: Bundle) -> None:
    without = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, clip=None))
    with pytest.raises(InputError, match=r"has no clip/ folder, .+: pass --clip FOLDER"):
        closed_form(without)
    text = dataclasses.replace(tiny.config.text, num_hidden_layers=3)
    deeper = dataclasses.replace(tiny.config.vision_side, text=text)
    with pytest.raises(InputError, match="the text encoder has 2 layers and the CLIP's text tower 3"):
        closed_form(dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, clip=deeper)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resample": 2}, "resample is 2, sdipc supports 3 for the safety checker"),
        ({"do_normalize": False}, "do_normalize is False, sdipc supports True"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_resize": False}, "do_resize is False"),
        ({"size": 20}, r"crop_size is \(28, 28\), expected at most the size, \(20, 20\)"),
    ],
)
def test_preprocessing_that_the_safety_checker_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    fine = Preprocessing(size=28, crop_size=(28, 28))
    SafetySide(CLIPVisionConfig(), fine)
    with pytest.raises(InputError, match=rf"^feature_extractor/preprocessor_config.json: {message}"):
        SafetySide(CLIPVisionConfig(), dataclasses.replace(fine, **options))
