"""SDXL's pictures added up, gone between and done in batches: each part of a vector by itself."""

import dataclasses
import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import parallel
from sdipc_jax.cli import main
from sdipc_jax.prompts.projection import end_states, mean_end_state
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from sdipc_jax.sampling.weights import (
    and_the_rest,
    layer_names,
    over_layers,
    over_places,
    over_steps,
    pooled_at,
    side_by_side,
)
from tests.picture_cases import write_picture
from tests.test_sdxl_pictures import CAPTIONS, quick_sdxl

pytestmark = pytest.mark.usefixtures("compile_quickly")

# The states of the first tower, those of the second, and the pooled vector.
PARTS = (slice(24), slice(24, 64), slice(64, 96))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two pictures, and captions."""
    folder = quick_sdxl(tmp_path_factory.mktemp("sdxl"))
    write_picture(folder / "clouds.png")
    Image.open(folder / "clouds.png").convert("RGB").rotate(90).save(folder / "stones.png")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> sdipc.Bundle:
    return sdipc.load(folder / "sdxl")


@pytest.fixture(scope="module")
def vectors(folder: Path, bundle: sdipc.Bundle) -> np.ndarray:
    """Both pictures'."""
    pixels = sdipc.read_pictures(bundle, [folder / "clouds.png", folder / "stones.png"])
    return np.asarray(sdipc.convert(sdipc.calibrate(bundle, CAPTIONS), sdipc.encode_images(bundle, pixels)))


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the sampler is asked for: prompt, negative prompt, and weights of several prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen: list[Any] = []

    def generate(mesh: Any, bundle: sdipc.Bundle, context: Any, report: Any, **options: Any) -> Any:
        seen.append((context, options["negative"], options["weights"]))
        return np.random.default_rng(0).random((len(context), 32, 32, 3)), np.zeros(len(context), bool)

    monkeypatch.setattr(parallel, "generate", generate)
    return seen


def run(folder: Path, tmp_path: Path, command: str, *arguments: Any) -> int:
    options = ["--model", folder / "sdxl", "--calibrate-captions", folder / "captions.txt", "--quiet", "--overwrite"]
    options += ["--output-dir", tmp_path / "out", "--num-images", 1, "--mesh", "data=1"]
    return main([str(each) for each in (command, *arguments, *options)])


def as_vectors(prompt: sdipc.Prompt) -> np.ndarray:
    """What stands behind the start token, everywhere the same, and the pooled vector."""
    context = np.asarray(prompt.context)
    np.testing.assert_array_equal(context[:, 1:], np.repeat(context[:, -1:], 19, axis=1))
    return np.concatenate([context[:, -1], np.asarray(prompt.pooled)], axis=1)


def lengths(vectors: np.ndarray, part: slice) -> np.ndarray:
    return np.linalg.norm(vectors[:, part], axis=1, keepdims=True)


def test_each_part_of_a_mix_has_its_length_and_the_pooled_vector_is_the_mean(
    folder: Path, tmp_path: Path, vectors: np.ndarray, prompts: list[Any]
) -> None:
    clouds, stones = folder / "clouds.png", folder / "stones.png"
    assert run(folder, tmp_path, "mix", clouds, stones, "--weights", 3, 1, "--negative-picture", stones) == 0
    (prompt, negative, _), *_ = prompts
    found, mean = as_vectors(prompt), (3 * vectors[:1] + vectors[1:]) / 4
    for part in PARTS[:2]:
        expected = mean[:, part] * lengths(vectors[:1], part) / lengths(mean, part)
        np.testing.assert_allclose(found[:, part], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[:, PARTS[2]], mean[:, PARTS[2]], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(as_vectors(negative), vectors[1:], rtol=1e-3, atol=1e-3)


def test_what_is_left_out_of_each_part(
    folder: Path, tmp_path: Path, bundle: sdipc.Bundle, vectors: np.ndarray, prompts: list[Any]
) -> None:
    stones = folder / "stones.png"
    options = ("--without", "bee", "--mean", "plain")
    assert run(folder, tmp_path, "mix", stones, *options) == 0
    found = as_vectors(prompts[0][0])
    middle = np.asarray(mean_end_state(bundle))
    word = np.asarray(end_states(bundle, sdipc.tokenize(bundle, ["bee"]))) - middle
    for part in PARTS:
        left, direction = (found - middle)[0, part], word[0, part]
        assert abs(left @ direction) < 1e-3 * np.linalg.norm(left) * np.linalg.norm(direction)
        assert np.linalg.norm(left) > 0.1


def test_the_way_from_a_picture_to_a_text(
    folder: Path, tmp_path: Path, bundle: sdipc.Bundle, vectors: np.ndarray, prompts: list[Any]
) -> None:
    assert run(folder, tmp_path, "interpolate", folder / "clouds.png", "a bee", "--frames", 3) == 0
    found = np.concatenate([as_vectors(prompt) for prompt, *_ in prompts])
    np.testing.assert_allclose(found[:1], vectors[:1], rtol=1e-3, atol=1e-3)
    tokens = sdipc.tokenize(bundle, ["a bee"])
    text, states = sdipc.text_prompt(bundle, tokens), np.asarray(end_states(bundle, tokens))
    np.testing.assert_array_equal(states[:, PARTS[2]], text.pooled)
    for part in PARTS[:2]:
        expected = states[:, part] * lengths(vectors[:1], part) / lengths(states, part)
        np.testing.assert_allclose(found[2:, part], expected, rtol=1e-3, atol=1e-3)
        halfway = found[:1, part] + found[2:, part]
        halfway *= lengths(vectors[:1], part) / np.linalg.norm(halfway, axis=1, keepdims=True)
        np.testing.assert_allclose(found[1:2, part], halfway, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[2:, PARTS[2]], text.pooled, rtol=1e-3, atol=1e-3)


def test_each_picture_counts_in_the_place_of_its_mask(
    folder: Path, tmp_path: Path, vectors: np.ndarray, prompts: list[Any]
) -> None:
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    Image.fromarray(half).save(tmp_path / "left.png")
    Image.fromarray(255 - half).save(tmp_path / "right.png")
    masks = ("--mask", tmp_path / "left.png", tmp_path / "right.png", "--end", 0.5, "--layers", "mid", "--steps", 4)
    assert run(folder, tmp_path, "mix", folder / "clouds.png", folder / "stones.png", *masks) == 0
    (prompt, _, found), *_ = prompts
    assert prompt.context.shape == (1, 3, 20, 64)
    np.testing.assert_allclose(prompt.context[0, :2, -1], vectors[:, :64], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(prompt.pooled[0, :2], vectors[:, 64:], rtol=1e-3, atol=1e-4)
    # Prompts, layers, evaluations, columns; what is left is the empty text's.
    layers = layer_names(sdipc.load(folder / "sdxl").config.unet)
    middle, columns = np.array(layers) == "mid", np.arange(8) < 4
    for picture, places in enumerate((columns, ~columns)):
        expected = middle[:, None, None] * (np.arange(4) < 2)[:, None] * places
        np.testing.assert_array_equal(found[0, picture, :, :, 0], expected)
    np.testing.assert_array_equal(found.sum(axis=1), 1)


def test_one_prompt_after_another_is_each_of_them_for_its_steps(bundle: sdipc.Bundle, vectors: np.ndarray) -> None:
    prompt = sdipc.image_prompt(bundle, vectors)
    both = jax.tree.map(lambda rows: rows[None], prompt)
    options: dict[str, Any] = {"seeds": 0, "steps": 4, "guidance_scale": 3.0, "sampler": "euler"}
    change = and_the_rest(over_steps(4, 0.0, 0.5))
    found = sdipc.generate(bundle, both, weights=change, **options)
    request, state = begin(bundle, prompt[:1], **options)
    state = advance(bundle, request, state, 0, 2)
    request, _ = begin(bundle, prompt[1:], **options)
    expected, _ = finish(bundle, advance(bundle, request, state, 2, 4))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # Each has its part in it.
    for row in prompt:
        assert np.abs(found - sdipc.generate(bundle, row, **options)).max() > 1e-3
    # One vector for both is the one that it is.
    shared = dataclasses.replace(both, pooled=both.pooled[:, 0])
    alone = dataclasses.replace(prompt[1:], pooled=prompt.pooled[:1])
    second = np.array([[0.0, 1.0]], np.float32).reshape(1, 2, 1, 1, 1, 1) * np.ones_like(change)
    now = sdipc.generate(bundle, shared, weights=second, **options)
    np.testing.assert_allclose(now, sdipc.generate(bundle, alone, **options), atol=1e-4)


def test_pooled_vectors_add_up_by_the_mean_weight_of_their_prompts() -> None:
    vectors = np.array([[[1.0, 0.0], [0.0, 1.0]]], np.float32)
    # Two layers, two evaluations, three places.
    first = np.zeros((1, 1, 2, 2, 1, 3), np.float32)
    first[0, 0, 0, 1, 0] = (1, 0.5, 0)
    weights = and_the_rest(first)
    np.testing.assert_allclose(pooled_at(weights, vectors, 0), [[0, 1]])
    np.testing.assert_allclose(pooled_at(weights, vectors, 1), [[0.25, 0.75]])
    np.testing.assert_array_equal(pooled_at(weights, vectors[:, 0], 1), vectors[:, 0])


def test_sizes_are_options(
    folder: Path, tmp_path: Path, prompts: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    clouds = folder / "clouds.png"
    sizes = ("--original-size", 90, 70, "--crop", 4, 8, "--height", 24)
    assert run(folder, tmp_path, "vary", clouds, *sizes) == 0
    np.testing.assert_array_equal(prompts[0][0].sizes, [[90, 70, 4, 8, 24, 32]])
    told = json.loads((tmp_path / "out/manifest.jsonl").read_text().splitlines()[0])["settings"]
    assert [told[name] for name in ("original_size", "crop", "target_size")] == [[90, 70], [4, 8], [24, 32]]
    assert run(folder, tmp_path, "vary", clouds, "--crop", 4) == 2
    assert "crop is (4,), expected two numbers" in capsys.readouterr().err
    assert main(["vary", str(clouds), "--target-size", "64", "64", "--output-dir", str(tmp_path / "other")]) == 2
    assert "found --target-size for a checkpoint that reads no sizes" in capsys.readouterr().err


def test_rows_with_masks_make_what_the_functions_make(
    folder: Path, tmp_path: Path, bundle: sdipc.Bundle, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    files = {name: str(folder / f"{name}.png") for name in ("clouds", "stones", "left", "right")}
    Image.fromarray(half).save(files["left"])
    Image.fromarray(255 - half).save(files["right"])
    rows: list[dict[str, Any]] = [
        {"pictures": [files["clouds"], files["stones"]], "mask": [files["left"], files["right"]], "weights": [1, 0.5],
         "end": 0.5, "text": "a!", "seed": 3},
        {"pictures": [files["stones"], files["clouds"]], "mask": [files["right"], files["left"]], "layers": "mid",
         "seed": 4},
    ]  # fmt: skip
    found = batch_of(folder, tmp_path, rows, steps=2)
    left = np.broadcast_to(np.arange(8) < 4, (8, 8)).astype(np.float32)
    strengths = np.reshape([1, 0.5], (1, 2, 1, 1, 1, 1))
    unet = bundle.config.unet
    counted = [
        over_steps(2, 0, 0.5) * over_places(np.stack([left, 1 - left])) * strengths,
        over_layers(unet, ["mid"]) * over_places(np.stack([1 - left, left])),
    ]
    rest = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a!", ""]))
    each = [sdipc.image_prompt(bundle, vectors[order]) for order in (np.array([0, 1]), np.array([1, 0]))]
    prompts = [
        jax.tree.map(lambda *leaves: np.concatenate(leaves), pictures, rest[place : place + 1])
        for place, pictures in enumerate(each)
    ]
    prompt, weights = side_by_side(list(zip(prompts, map(and_the_rest, counted), strict=True)))
    expected = sdipc.generate(bundle, prompt, weights=weights, seeds=np.array([3, 4]), steps=2)
    assert np.abs(found - 255 * np.asarray(expected)).max() <= 2
    assert (found[0] != found[1]).any()


def batch_of(folder: Path, tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> np.ndarray:
    """The pictures of a job of two rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "source": tmp_path / "rows.jsonl", "model": folder / "sdxl", "calibrate_captions": folder / "captions.txt",
        "output_dir": tmp_path / "out", "batch_size": 2, **settings,
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    assert main(["batch", str(tmp_path / "job.yaml"), "--quiet"]) == 0
    with tarfile.open(tmp_path / "out/shard-00000.tar") as archive:
        files = [archive.extractfile(name) for name in archive.getnames() if name.endswith(".png")]
        return np.stack([np.asarray(Image.open(BytesIO(file.read()))) for file in files if file is not None])


def test_a_batch_makes_what_the_functions_make(
    folder: Path, tmp_path: Path, bundle: sdipc.Bundle, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {"picture": str(folder / "clouds.png"), "text": "a!", "alpha": 0.5, "seed": 3, "original_size": [90, 70]},
        {"pictures": [str(folder / "clouds.png"), str(folder / "stones.png")], "negative_prompt": "b", "seed": 4,
         "mean": "plain"},
    ]  # fmt: skip
    found = batch_of(folder, tmp_path, rows, steps=1, crop=[4, 8])
    both = np.concatenate([vectors[:1], vectors.mean(axis=0, keepdims=True)])
    tokens = sdipc.tokenize(bundle, ["a!", ""])
    prompt = sdipc.edit_prompt(bundle, both, tokens, np.array([0.5, 0.0], np.float32))
    negative = sdipc.negative_prompt(bundle, sdipc.tokenize(bundle, ["", "b"]), given=np.array([False, True]))
    prompt = prompt.with_sizes(original=np.array([[90, 70], [32, 32]]), target=(32, 32), crop=(4, 8))
    expected = sdipc.generate(
        bundle, prompt, negative=negative, seeds=np.array([3, 4]), indices=np.array([0, 0]), steps=1
    )
    assert np.abs(found - 255 * np.asarray(expected)).max() <= 2
    assert (found[0] != found[1]).any()
