"""The checkpoint that ships: what its files are, and that it finds what the example drawings show.

The thresholds are module constants, to be set from measurements (`sdipc evaluate embedded`, several seeds) whenever
the weights are replaced.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from PIL import Image
from safetensors import safe_open

from sdipc_jax import (
    Bundle,
    Projection,
    closed_form,
    convert,
    encode_images,
    generate,
    image_prompt,
    load,
    read_pictures,
)
from sdipc_jax.evaluate.metrics import ranks, unit
from sdipc_jax.evaluate.retrieval import end_states, image_features, text_projection
from sdipc_jax.sampling.decoding import to_uint8

LARGEST_BYTES = 20_000_000

# Of twelve captions, how many wrong ones stand before the right one on average: 0 at best, 5.5 by chance. The weights
# reach 0.17 for text states, and 0.92, 0.67, 0.08 and 0.33 for variations with seeds 0 to 3, in 20 steps.
MOST_WRONG_FROM_VECTORS = 0.75
MOST_WRONG_FROM_PICTURES = 1.25

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "sdipc_jax" / "embedded"
EXAMPLES = sorted((ROOT / "examples").glob("*.png"))

PACKAGES = (
    "emojibase-data",
    "@iconify-json/noto",
    "@iconify-json/twemoji",
    "@lobehub/fluent-emoji-3d",
    "@iconify-json/fluent-emoji-flat",
    "@iconify-json/noto-v1",
    "@iconify-json/emojione",
)
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "clip/model.safetensors",
)


@dataclass(frozen=True)
class Shipped:
    """The checkpoint with what it makes of the example pictures and their captions, which are the files' names."""

    bundle: Bundle
    projection: Projection
    features: Float[Array, "N D_image"]
    states: Float[np.ndarray, "N D_text"]


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    bundle = load("embedded")
    captions = [path.stem.replace("-", " ") for path in EXAMPLES]
    features = encode_images(bundle, jnp.asarray(read_pictures(bundle, EXAMPLES)))
    return Shipped(bundle, closed_form(bundle), features, end_states(bundle, captions))


def test_it_is_small_enough_to_ship() -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(FOLDER.rglob("*")):
            archive.write(path, path.relative_to(FOLDER))
    assert len(wheel.getvalue()) <= LARGEST_BYTES


def test_it_has_the_layout_of_a_diffusers_pipeline() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part, (_, name) in ((part, value) for part, value in index.items() if isinstance(value, list)):
        assert name is None or (FOLDER / part).is_dir(), part
    for name in ("clip/config.json", "clip/preprocessor_config.json", "tokenizer/vocab.json", "sdipc.json"):
        assert (FOLDER / name).is_file(), name


@pytest.mark.parametrize("name", WEIGHTS)
def test_its_weights_are_finite_and_in_float16(name: str) -> None:
    with safe_open(FOLDER / name, "np") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            tensor = file.get_tensor(key)
            if np.issubdtype(tensor.dtype, np.floating):
                assert tensor.dtype == np.float16 or tensor.ndim == 0, key
            assert np.isfinite(tensor).all(), key


def test_it_makes_64_pixels_from_latents_of_8(shipped: Shipped) -> None:
    config = shipped.bundle.config
    assert (config.defaults.height, config.defaults.width) == (64, 64)
    assert config.latent_shape(64, 64) == (4, 8, 8)
    assert config.tokens.length == 77
    assert config.defaults.scale is not None


def test_its_text_projection_can_be_inverted(shipped: Shipped) -> None:
    values = np.asarray(shipped.projection.singular_values)
    assert shipped.projection.rank == len(values)
    assert values.min() > 0.1 * values.max()


def test_its_attribution_names_what_it_was_trained_on() -> None:
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert f"{package}@" in text
    for licence in ("Apache-2.0", "CC-BY-4.0", "MIT"):
        assert licence in text
    assert "openmoji" not in text.lower()


def test_every_example_is_64_pixels_and_attributed() -> None:
    text = (ROOT / "examples" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 12
    for path in EXAMPLES:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
        assert f"| {path.name} |" in text
    assert text.count(".png |") == len(EXAMPLES)
    assert "openmoji" not in text.lower()


def check_recognised(
    found: Float[np.ndarray, "N D"], captions: Float[np.ndarray, "M D"], truth: Sequence[int], most_wrong: float
) -> None:
    """Asserts that few wrong captions are nearer than the right one."""
    wrong = ranks(unit(found) @ unit(captions).T, np.array(truth)).mean()
    assert wrong <= most_wrong, f"{wrong:.2f} wrong captions stand before the right one, expected {most_wrong} at most"


def test_example_pictures_are_recognised_as_text_states(shipped: Shipped) -> None:
    vectors = np.asarray(convert(shipped.projection, shipped.features))
    check_recognised(vectors, shipped.states, range(len(vectors)), MOST_WRONG_FROM_VECTORS)


@pytest.mark.parametrize("spoilt", ["shuffled", "zeroed"])
def test_that_check_fails_for_a_spoilt_projection(shipped: Shipped, spoilt: str) -> None:
    vectors = np.asarray(convert(shipped.projection, shipped.features))
    vectors = np.roll(vectors, 1, axis=0) if spoilt == "shuffled" else 0 * vectors
    with pytest.raises(AssertionError, match="wrong captions stand before the right one"):
        check_recognised(vectors, shipped.states, range(len(vectors)), MOST_WRONG_FROM_VECTORS)


def check_variations_recognised(shipped: Shipped, vectors: Float[Array, "N D"]) -> None:
    """Asserts that the own CLIP finds the example's caption for a picture generated from its vector."""
    made = to_uint8(generate(shipped.bundle, image_prompt(shipped.bundle, vectors), seeds=0, steps=20))
    found = image_features(shipped.bundle, made) @ np.asarray(shipped.projection.visual)
    captions = shipped.states @ text_projection(shipped.bundle)
    check_recognised(found, captions, range(len(EXAMPLES)), MOST_WRONG_FROM_PICTURES)


def test_variations_of_example_pictures_are_recognised(shipped: Shipped) -> None:
    check_variations_recognised(shipped, convert(shipped.projection, shipped.features))


@pytest.mark.parametrize("spoilt", ["shuffled", "zeroed"])
def test_that_check_of_variations_fails_for_a_spoilt_projection(shipped: Shipped, spoilt: str) -> None:
    vectors = convert(shipped.projection, shipped.features)
    vectors = jnp.roll(vectors, 1, axis=0) if spoilt == "shuffled" else 0 * vectors
    with pytest.raises(AssertionError, match="wrong captions stand before the right one"):
        check_variations_recognised(shipped, vectors)
