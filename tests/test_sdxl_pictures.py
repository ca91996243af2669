"""Pictures as prompts for SDXL: both towers' states fitted to captions, the pooled vector the picture's own."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sdipc_jax as sdipc
from sdipc_jax import parallel
from sdipc_jax.checkpoints.bundle import VisionSide
from sdipc_jax.cli import main
from sdipc_jax.models import CLIPVisionConfig
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.prompts import converter
from sdipc_jax.prompts.contexts import end_positions
from tests.picture_cases import write_picture
from tests.tiny import quick_unet, tiny_sdxl

CAPTIONS = [f"{one} {other}" for one in ("a", "bee", "cat", "d?", "xyz", "no") for other in ("e", "fg", "h.", "dog")]


def with_clip(folder: Path, **changes: Any) -> sdipc.Bundle:
    """SDXL with the CLIP of its second tower."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7,
        projection_dim=32,
    )  # fmt: skip
    bundle = tiny_sdxl(folder)
    text = bundle.config.text_2
    assert text is not None
    side = VisionSide(str(folder / "clip"), vision, Preprocessing(size=28, crop_size=(28, 28)), 32, text)
    bundle = tiny_sdxl(folder / "again", clip=side, **changes)
    second = bundle.params["text_encoder_2"]["text_projection"]["kernel"]
    bundle.params["clip"]["text_projection"]["kernel"] = second
    return bundle


def quick_sdxl(parts: Path) -> Path:
    """Writes such a checkpoint, with a UNet that compiles quickly, as `sdxl` in a folder, and returns the folder."""
    unet = quick_unet(tiny_sdxl(parts / "plain").config.unet)
    sdipc.save(with_clip(parts / "parts", unet=unet), parts / "sdxl")
    return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = tmp_path_factory.mktemp("sdxl")
    sdipc.save(with_clip(parts / "parts"), parts / "sdxl")
    write_picture(parts / "clouds.png")
    (parts / "captions.txt").write_text("\n".join(CAPTIONS))
    return parts


@pytest.fixture(scope="module")
def bundle(folder: Path) -> sdipc.Bundle:
    return sdipc.load(folder / "sdxl")


def test_both_towers_are_fitted_and_the_pooled_vector_is_the_pictures_own(bundle: sdipc.Bundle) -> None:
    projection = sdipc.calibrate(bundle, CAPTIONS, ridge=0.5)
    features = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    found = np.asarray(sdipc.convert(projection, features))
    visual = np.asarray(bundle.params["clip"]["visual_projection"]["kernel"], np.float64)
    np.testing.assert_allclose(found[:, 64:], features @ visual, rtol=1e-4, atol=1e-5)
    # The ridge map of each tower's states, written out.
    tokens = sdipc.tokenize(bundle, CAPTIONS)
    prompt = sdipc.text_prompt(bundle, tokens)
    w = np.asarray(prompt.pooled, np.float64)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    centred = w - w.mean(axis=0)
    covariance = centred.T @ centred / len(w)
    inverse = np.linalg.inv(covariance + 0.5 * np.trace(covariance) / 32 * np.eye(32))
    u = features @ visual
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    for tower, part in enumerate((slice(0, 24), slice(24, 64))):
        ends = end_positions(tokens[:, tower], bundle.config.towers[tower][1].end)
        states = np.asarray(prompt.context, np.float64)[np.arange(len(w)), np.asarray(ends), part]
        mapped = states.mean(axis=0) + (u - w.mean(axis=0)) @ inverse @ (centred.T @ states / len(w))
        mapped *= np.linalg.norm(states, axis=1).mean() / np.linalg.norm(mapped, axis=1, keepdims=True)
        np.testing.assert_allclose(found[:, part], mapped, rtol=2e-3, atol=2e-3)


def test_another_clips_pooled_vector_is_fitted(bundle: sdipc.Bundle) -> None:
    clip = dict(bundle.params["clip"])
    kernel = np.random.default_rng(1).standard_normal((40, 32)).astype(np.float32)
    clip["text_projection"] = {"kernel": kernel}
    other = sdipc.Bundle(bundle.params | {"clip": clip}, bundle.config)
    projection = sdipc.calibrate(other, CAPTIONS, ridge=0.5)
    assert not projection.joint_last
    pooled = np.asarray(sdipc.convert(projection, np.ones((2, 32), np.float32)))[:, 64:]
    lengths = np.linalg.norm(np.asarray(sdipc.text_prompt(other, sdipc.tokenize(other, CAPTIONS)).pooled), axis=1)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), lengths.mean(), rtol=1e-4)


def test_the_inverse_is_refused(bundle: sdipc.Bundle) -> None:
    with pytest.raises(sdipc.InputError, match="before their last layers"):
        sdipc.closed_form(bundle)


def run(folder: Path, *arguments: Any) -> int:
    options = ["--model", folder / "sdxl", "--calibrate-captions", folder / "captions.txt", "--quiet"]
    return main([str(each) for each in (*arguments, *options)])


def test_prompt_writes_what_diffusers_takes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "prompts.safetensors"
    assert run(folder, "prompt", folder / "clouds.png", "--output", output) == 0
    arrays = load_file(output)
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == {
        "prompt_embeds": (1, 20, 64),
        "pooled_prompt_embeds": (1, 32),
        "negative_prompt_embeds": (1, 20, 64),
        "negative_pooled_prompt_embeds": (1, 32),
        "image_vectors": (1, 96),
    }
    assert not arrays["negative_prompt_embeds"].any()
    np.testing.assert_array_equal(arrays["prompt_embeds"][:, 1], arrays["image_vectors"][:, :64])
    np.testing.assert_array_equal(arrays["pooled_prompt_embeds"], arrays["image_vectors"][:, 64:])


@pytest.mark.parametrize("command", [("vary",), ("edit", "a!")])
def test_towers_are_let_go_before_sampling(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    towers: list[Any] = []
    original = converter.load_weights

    def loaded(*arguments: Any) -> sdipc.Bundle:
        bundle = original(*arguments)
        embedding = bundle.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
        towers.append(weakref.ref(embedding))
        return bundle

    seen: list[Any] = []

    def generate(mesh: Any, bundle: sdipc.Bundle, context: Any, report: Any, **options: Any) -> Any:
        gc.collect()
        seen.append((set(bundle.params), towers[0](), options["negative"]))
        return np.zeros((len(context), 32, 32, 3)), np.zeros(len(context), bool)

    monkeypatch.setattr(converter, "load_weights", loaded)
    monkeypatch.setattr(parallel, "generate", generate)
    name, *text = command
    output = tmp_path / "out"
    assert run(folder, name, folder / "clouds.png", *text, "--num-images", 1, "--output-dir", output) == 0
    (parts, tower, negative), *_ = seen
    assert parts == {"unet", "vae"}
    assert tower is None
    assert not np.asarray(negative.context).any()
