"""The commands that mix pictures, go from one to another, and say where and when a picture counts."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import Bundle, cli, parallel
from sdipc_jax.prompts import algebra
from sdipc_jax.prompts import converter as converting
from sdipc_jax.prompts.projection import end_states, mean_end_state
from sdipc_jax.sampling import encode_pictures

FAST = ["--steps", "4", "--quiet"]


class Sampler:
    """Takes the place of the sampler, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.contexts: list[np.ndarray] = []
        self.weights: list[Any] = []
        self.negative: Any = None
        self.start: Any = None

    def __call__(self, mesh: Any, bundle: Bundle, context: Any, report: Any, **settings: Any) -> Any:
        # An animation keeps no frame twice: each picture has a grey of its own.
        levels = (len(self.contexts) + np.arange(len(context))) / 20
        self.contexts += list(np.asarray(context))
        self.weights.append(settings["weights"])
        self.negative, self.start = np.asarray(settings["negative"]), settings["start"]
        return np.broadcast_to(levels[:, None, None, None], (len(context), 32, 32, 3)), np.zeros(len(context), bool)


@pytest.fixture
def sampler(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    made = Sampler()
    monkeypatch.setattr(parallel, "generate", made)
    monkeypatch.setattr(converting, "load_weights", lambda config, tuned: tiny)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three pictures, and masks of the left and the right half."""
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    arrays = {name: generator.integers(0, 256, (40, 40, 3), np.uint8) for name in ("cat", "dog", "owl")}
    arrays["left"] = np.zeros((32, 32), np.uint8)
    arrays["left"][:, :16] = 255
    arrays["right"] = 255 - arrays["left"]
    arrays["wide"] = np.full((32, 48), 255, np.uint8)
    arrays["black"] = np.zeros((32, 32), np.uint8)
    for name, pixels in arrays.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in arrays}


@pytest.fixture(scope="module")
def vectors(tiny: Bundle, files: dict[str, Path]) -> dict[str, jax.Array]:
    """Each picture's vector, and each word's end state."""
    projection = sdipc.closed_form(tiny)
    names = ["cat", "dog", "owl"]
    pixels = sdipc.read_pictures(tiny, [files[name] for name in names])
    found = sdipc.convert(projection, sdipc.encode_images(tiny, pixels))
    words = end_states(tiny, sdipc.tokenize(tiny, ["red", ""]))
    return {name: found[place : place + 1] for place, name in enumerate(names)} | {
        "red": words[:1],
        "": words[1:],
        "middle": mean_end_state(tiny),
        "scale": projection.scale,
    }


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Any:
    def command(*arguments: object) -> int:
        out = ["--model", tiny_folder, "--output-dir", tmp_path / "out"]
        return cli.main([*map(str, (*arguments, *out)), *FAST])

    return command


def refuse(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err


def test_mix_is_the_weighted_mean_at_a_prompts_length(
    run: Any, sampler: Sampler, tiny: Bundle, files: dict[str, Path], vectors: dict[str, Any], tmp_path: Path
) -> None:
    assert run("mix", files["cat"], files["dog"], "--weights", 3, -1, "--num-images", 2) == 0
    expected = 3 * vectors["cat"] - vectors["dog"]
    expected = vectors["scale"] * expected / np.linalg.norm(expected)
    np.testing.assert_allclose(sampler.contexts[0][1:], np.repeat(expected, 19, axis=0), atol=1e-4)
    np.testing.assert_array_equal(sampler.contexts[0], sampler.contexts[1])
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["cat+dog-000.png", "cat+dog-001.png"]
    assert [each["input"] for each in lines[0]["inputs"]] == [str(files["cat"]), str(files["dog"])]
    assert lines[0]["weights"] == [3, -1]


def test_plain_mean_and_text(
    run: Any, sampler: Sampler, tiny: Bundle, files: dict[str, Path], vectors: dict[str, Any]
) -> None:
    assert run("mix", files["cat"], files["dog"], "--mean", "plain", "--text", "red", "--alpha", "0.5") == 0
    mean = (vectors["cat"] + vectors["dog"]) / 2
    context = sdipc.edit_prompt(tiny, mean, sdipc.tokenize(tiny, ["red"]), 0.5)
    np.testing.assert_allclose(sampler.contexts[0], context[0], atol=1e-4)


def test_what_is_left_out_has_no_part_in_the_mix(
    run: Any, sampler: Sampler, files: dict[str, Path], vectors: dict[str, Any]
) -> None:
    assert run("mix", files["cat"], "--without", "red", files["owl"], "--mean", "plain") == 0
    left = sampler.contexts[0][-1] - vectors["middle"][0]
    for name in ("red", "owl"):
        direction = (vectors[name] - vectors["middle"])[0]
        assert abs(left @ direction) < 1e-4 * np.linalg.norm(left) * np.linalg.norm(direction)
    assert np.linalg.norm(left) > 0.1


def test_each_picture_in_its_own_place(
    run: Any, sampler: Sampler, tiny: Bundle, files: dict[str, Path], vectors: dict[str, Any]
) -> None:
    masks = ["--mask", files["left"], files["right"]]
    assert run("mix", files["cat"], files["dog"], *masks, "--weights", 1, 0.25, "--text", "red") == 0
    context, weights = sampler.contexts[0], sampler.weights[0]
    assert context.shape == (3, 20, 24)
    np.testing.assert_allclose(context[:2, -1], np.concatenate([vectors["cat"], vectors["dog"]]), atol=1e-4)
    np.testing.assert_allclose(context[2], sdipc.text_prompt(tiny, sdipc.tokenize(tiny, ["red"]))[0], atol=1e-5)
    assert weights.shape == (1, 3, 1, 4, 8, 8)
    assert weights[0, :, 0, 0, 3, 0].tolist() == [1, 0, 0]
    assert weights[0, :, 0, 0, 3, 7].tolist() == [0, 0.25, 0.75]


def test_vary_at_some_steps_in_some_layers(
    run: Any, sampler: Sampler, tiny: Bundle, files: dict[str, Path], vectors: dict[str, Any]
) -> None:
    assert run("vary", files["cat"], files["dog"], "--end", 0.5, "--layers", "mid,up", "--mask", files["left"]) == 0
    assert sampler.contexts[0].shape == (2, 20, 24)
    empty = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, [""]))[0]
    np.testing.assert_allclose(sampler.contexts[0][1], empty, atol=1e-5)
    np.testing.assert_allclose(sampler.contexts[-1][0, -1], vectors["dog"][0], atol=1e-4)
    weights = np.broadcast_to(sampler.weights[0], (1, 2, 4, 4, 8, 8))
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert weights[0, 0, :, :, 0, 0].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert not weights[0, 0, :, :, 0, 4:].any()


def test_without_controls_it_is_the_plain_prompt(run: Any, sampler: Sampler, files: dict[str, Path]) -> None:
    assert run("vary", files["cat"], "--start", 0, "--end", 1, "--layers", "all") == 0
    assert sampler.contexts[0].shape == (20, 24)
    assert sampler.weights == [None]


def test_negative_pictures(
    run: Any, sampler: Sampler, tiny: Bundle, files: dict[str, Path], vectors: dict[str, Any]
) -> None:
    assert run("edit", files["cat"], "red", "--negative-picture", files["dog"], files["owl"]) == 0
    mean = algebra.mean_direction(np.concatenate([vectors["dog"], vectors["owl"]]), None, vectors["scale"])
    np.testing.assert_allclose(sampler.negative, sdipc.image_prompt(tiny, mean), atol=1e-4)


def test_interpolate_goes_from_one_to_the_other(
    run: Any, sampler: Sampler, files: dict[str, Path], vectors: dict[str, Any], tmp_path: Path
) -> None:
    assert run("interpolate", files["cat"], "red", "--frames", 3) == 0
    ends = algebra.with_length(vectors["cat"], vectors["scale"]), algebra.with_length(vectors["red"], vectors["scale"])
    expected = algebra.slerp(*ends, np.array([0, 0.5, 1]))
    np.testing.assert_allclose(np.stack([context[-1] for context in sampler.contexts]), expected, atol=1e-4)
    out = tmp_path / "out"
    names = ["frame-0-000.png", "frame-1-000.png", "frame-2-000.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*names, "animation.webp", "manifest.jsonl", "sheet.png", "strip.png"]
    )
    with Image.open(out / "animation.webp") as animation:
        assert (animation.size, animation.n_frames) == ((32, 32), 4)
    with Image.open(out / "strip.png") as strip:
        assert strip.width > 2.5 * strip.height
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["share"] for line in lines] == [0, 0.5, 1]
    assert lines[0]["inputs"][1] == {"text": "red"}


def test_strength_alone_starts_from_the_picture_itself(
    run: Any, sampler: Sampler, tiny: Bundle, files: dict[str, Path]
) -> None:
    assert run("vary", files["cat"], files["left"], "--strength", 0.5, "--num-images", 1) == 0
    assert sampler.start.strength == 0.5
    assert sampler.start.mask is None
    with Image.open(files["left"]) as opened:
        pixels = np.asarray(opened.convert("RGB"), np.float32)[None] / 255
    np.testing.assert_allclose(sampler.start.latents[1], encode_pictures(tiny, pixels)[0], atol=1e-5)


def test_a_text_repaints_a_part_of_a_picture(
    run: Any, sampler: Sampler, tiny: Bundle, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdipc_jax.commands.opening.load_weights", lambda config, tuned: tiny)
    assert run("text", "red", "cat", "--init-image", files["cat"], "--mask-image", files["left"]) == 0
    assert sampler.start.strength == 1
    # Two texts, four pictures each.
    assert sampler.start.latents.shape == (8, 8, 8, 4)
    assert np.asarray(sampler.start.mask)[0, 5, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    line = json.loads((tmp_path / "out/manifest.jsonl").read_text().splitlines()[0])
    assert line["init_sha256"] == [hashlib.sha256(files["cat"].read_bytes()).hexdigest()]
    assert line["mask_sha256"] == hashlib.sha256(files["left"].read_bytes()).hexdigest()


def test_padding_paints_what_the_pictures_shape_leaves(run: Any, sampler: Sampler, files: dict[str, Path]) -> None:
    assert run("edit", files["cat"], "red", "--pad", "--width", 48, "--num-images", 1) == 0
    assert np.asarray(sampler.start.mask)[0, 3, :, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mix", "cat", "--weights", "1", "2"], "found 2 weights for 1 pictures, expected as many"),
        (["mix", "cat", "dog", "--weights", "1", "-1"], "expected a sum that is not 0"),
        (["mix", "cat", "dog", "--mask", "left"], "found 1 masks for 2 pictures, expected as many or none"),
        (["mix", "cat", "nothing"], "No such file or directory"),
        (["mix", "cat", "dog", "--mask", "left", "black"], "found a mask that is black, expected white where"),
        (["vary", "cat", "--layers", "down.9"], "the layer 'down.9' does not exist, expected one of down.0.0, mid"),
        (["vary", "cat", "--start", "0.5", "--end", "0.5"], "start is 0.5 and end 0.5, expected start < end"),
        (["vary", "cat", "--end", "1.5"], "end is 1.5, expected less than or equal to 1"),
        (["vary", "cat", "--negative-picture", "nothing"], "No such file or directory"),
        (["vary", "cat", "--init-image", "dog"], "found init_image without strength, expected how much is redone"),
        (["vary", "cat", "--strength", "0"], "strength is '0', expected greater than 0"),
        (["vary", "cat", "--strength", "0.2"], "strength is 0.2, which of 4 steps leaves none"),
        (["vary", "cat", "--mask-image", "black"], "found a mask that is black, expected white where the picture"),
        (["vary", "cat", "--mask-image", "wide"], "found a mask of 32x48, expected the shape of 32x32 or 40x40"),
        (["vary", "cat", "--mask", "wide"], "found a mask of 32x48, expected the shape of 32x32"),
        (["vary", "cat", "--strength", "1.5"], "strength is '1.5', expected less than or equal to 1"),
        (["vary", "cat", "--pad"], "the picture has the shape of 32x32 already"),
        (["vary", "cat", "--pad", "--mask-image", "left"], "found both mask_image and pad, expected one of them"),
        (["text", "red", "--strength", "0.5"], "found strength and no picture to start from, expected one"),
        (["interpolate", "cat", "dog", "--frames", "1"], "frames is 1, expected greater than or equal to 2"),
    ],
)
def test_refusals(
    run: Any,
    sampler: Sampler,
    files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert message in refuse(capsys, run(*(files.get(each, each) for each in arguments)))
    assert not (tmp_path / "out").exists()
    assert sampler.contexts == []
