"""SDXL's pictures added up, gone between and done in batches: each part of a vector by itself."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import parallel
from sdipc_jax.cli import main
from sdipc_jax.prompts.projection import end_states, mean_end_state
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
    """What the sampler is asked for, prompt and negative prompt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen: list[Any] = []

    def generate(mesh: Any, bundle: sdipc.Bundle, context: Any, report: Any, **options: Any) -> Any:
        seen.append((context, options["negative"]))
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
    (prompt, negative), *_ = prompts
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
    found = np.concatenate([as_vectors(prompt) for prompt, _ in prompts])
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


def test_a_batch_makes_what_the_functions_make(
    folder: Path, tmp_path: Path, bundle: sdipc.Bundle, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {"picture": str(folder / "clouds.png"), "text": "a!", "alpha": 0.5, "seed": 3},
        {"pictures": [str(folder / "clouds.png"), str(folder / "stones.png")], "negative_prompt": "b", "seed": 4},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "source": tmp_path / "rows.jsonl", "model": folder / "sdxl", "calibrate_captions": folder / "captions.txt",
        "output_dir": tmp_path / "out", "steps": 1, "batch_size": 2,
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    assert main(["batch", str(tmp_path / "job.yaml"), "--quiet"]) == 0
    with tarfile.open(tmp_path / "out/shard-00000.tar") as archive:
        files = [archive.extractfile(name) for name in archive.getnames() if name.endswith(".png")]
        found = np.stack([np.asarray(Image.open(BytesIO(file.read()))) for file in files if file is not None])
    both = np.concatenate([vectors[:1], vectors.mean(axis=0, keepdims=True)])
    tokens = sdipc.tokenize(bundle, ["a!", ""])
    prompt = sdipc.edit_prompt(bundle, both, tokens, np.array([0.5, 0.0], np.float32))
    negative = sdipc.negative_prompt(bundle, sdipc.tokenize(bundle, ["", "b"]), given=np.array([False, True]))
    expected = sdipc.generate(
        bundle, prompt, negative=negative, seeds=np.array([3, 4]), indices=np.array([0, 0]), steps=1
    )
    assert np.abs(found - 255 * np.asarray(expected)).max() <= 2
    assert (found[0] != found[1]).any()
