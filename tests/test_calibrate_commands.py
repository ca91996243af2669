"""Calibration from the command line, on a checkpoint in miniature that is cut as Stable Diffusion 2.x is."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import sdipc_jax as sdipc
from sdipc_jax import cli, parallel
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.compilation import cache_folder
from sdipc_jax.prompts import converter
from sdipc_jax.prompts.calibration import fit_captions
from sdipc_jax.prompts.everyday import everyday_captions
from tests.compare import relative_error
from tests.tiny import SMALL_UNET, tiny_bundle, write_tokenizer

CAPTIONS = everyday_captions(60)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("sdipc: ")
    assert message.count("\n") == 1
    return message


def prompts(folder: Path, *arguments: object) -> dict[str, np.ndarray]:
    """What `prompt` writes."""
    file = folder / "prompts.safetensors"
    assert run("prompt", *arguments, "--output", file, "--overwrite") == 0
    return load_file(file)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).resize((70, 90)).save(path)
    return path


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n\n")
    return path


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its text encoder is its CLIP's text tower of three layers without the last, and "!" is its pad."""
    parts, folder = tmp_path_factory.mktemp("parts"), tmp_path_factory.mktemp("second") / "checkpoint"
    plain = tiny_bundle(parts / "plain").config
    text = dataclasses.replace(plain.text, num_hidden_layers=3)
    sdipc.save(tiny_bundle(parts / "deep", text=text, unet=SMALL_UNET), folder)
    weights = load_file(folder / "text_encoder/model.safetensors")
    save_file(
        {name: leaf for name, leaf in weights.items() if ".layers.2." not in name},
        folder / "text_encoder/model.safetensors",
        metadata={"format": "pt"},
    )
    change(folder / "text_encoder/config.json", num_hidden_layers=2)
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer", pad="!")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder("calibrations")


def test_vary_works_where_the_inverse_does_not_reach(
    second: Path, picture: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("vary", picture, "--model", second, "--calibrate-captions", captions, "--output-dir", tmp_path / "out")
    small = ("--num-images", 1, "--steps", 1, "--mesh", "data=1", "--guidance-scale", 1)
    assert run(*arguments, *small) == 0
    assert "calibrated on 60 captions with ridge 1: R^2 " in capsys.readouterr().out
    line = json.loads((tmp_path / "out/manifest.jsonl").read_text())
    assert (tmp_path / "out" / line["file"]).is_file()
    settings = line["settings"]
    assert settings["calibrate"] == "auto"
    found = settings["calibration"]
    assert (found["captions"], found["ridge"], len(found["r2"])) == (60, 1.0, 1)
    assert len(found["captions_sha256"]) == 64


def test_prompts_are_those_of_the_fit_and_kept(
    second: Path, picture: Path, captions: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (picture, "--model", second, "--calibrate-captions", captions)
    first = prompts(tmp_path, *arguments)
    bundle = sdipc.load(second)
    fitted = fit_captions(bundle, load_text_tower(bundle.config), CAPTIONS)
    features = sdipc.encode_images(bundle, sdipc.read_pictures(bundle, [picture]))
    expected = sdipc.image_prompt(bundle, sdipc.convert(fitted.projection(bundle), features))
    assert relative_error(first["prompt_embeds"], expected) <= 1e-5
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700

    def refuse_to_read(config: object) -> None:
        raise AssertionError("the text tower is read again")

    monkeypatch.setattr(converter, "load_text_tower", refuse_to_read)
    again = prompts(tmp_path, *arguments)
    np.testing.assert_array_equal(again["prompt_embeds"], first["prompt_embeds"])
    for other in (("--ridge", 0.5), ("--after-end", "own"), ("--dtype", "bfloat16")):
        with pytest.raises(AssertionError, match="read again"):
            run("prompt", *arguments, *other, "--output", tmp_path / "other.safetensors")
    # A damaged file is not believed.
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    mended = prompts(tmp_path, *arguments)
    np.testing.assert_array_equal(mended["prompt_embeds"], first["prompt_embeds"])
    assert bytes(data) != file.read_bytes()


@pytest.mark.parametrize("mode, words", [(0o777, "others can write to"), (None, "cannot be written")])
def test_what_cannot_be_kept_is_a_note(
    second: Path, picture: Path, captions: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str],
    mode: int | None, words: str,
) -> None:  # fmt: skip
    if mode is None:
        cache.parent.parent.write_text("a file where the folder would be")
    else:
        cache.mkdir(parents=True)
        cache.chmod(mode)
    prompts(tmp_path, picture, "--model", second, "--calibrate-captions", captions)
    assert words in capsys.readouterr().out
    assert mode is None or not list(cache.iterdir())


def test_each_places_own_state(second: Path, picture: Path, captions: Path, tmp_path: Path) -> None:
    arguments = (picture, "--model", second, "--calibrate-captions", captions)
    repeated, own = prompts(tmp_path, *arguments), prompts(tmp_path, *arguments, "--after-end", "own")
    assert own["image_vectors"].shape == repeated["image_vectors"].shape
    np.testing.assert_allclose(own["image_vectors"], repeated["image_vectors"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(repeated["prompt_embeds"][:, 1], repeated["prompt_embeds"][:, -1])
    assert relative_error(own["prompt_embeds"][:, 1], own["prompt_embeds"][:, -1]) > 0.01


def test_the_mean_shift(
    tiny_folder: Path, picture: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for seed in range(30):
        noise = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
    arguments = (picture, "--model", tiny_folder, "--calibrate-captions", captions, "--calibrate-pictures", folder)
    found = {}
    for method in ("pinv", "ridge"):
        found[method] = prompts(tmp_path, *arguments, "--calibrate", method)["image_vectors"]
        said = capsys.readouterr().out
        assert "the means of 30 pictures and of the captions are " in said
        assert "100 pictures of many kinds would be better" in said
    bundle = sdipc.load(tiny_folder)
    paths = sorted(folder.iterdir())
    shifted = sdipc.calibrate(bundle, CAPTIONS, paths)
    features = sdipc.encode_images(bundle, sdipc.read_pictures(bundle, [picture]))
    assert relative_error(found["ridge"], sdipc.convert(shifted, features)) <= 1e-5
    plain = sdipc.convert(sdipc.closed_form(bundle), features)
    assert relative_error(found["pinv"], plain) > 0.01
    paths[0].unlink()
    words = "found 29 pictures, expected at least 30, better 100 of many kinds"
    assert words in refuse(capsys, "prompt", *arguments, "--output", tmp_path / "refused.safetensors")


def test_without_the_option_nothing_has_changed(tiny_folder: Path, picture: Path, tmp_path: Path) -> None:
    bundle = sdipc.load(tiny_folder)
    features = sdipc.encode_images(bundle, sdipc.read_pictures(bundle, [picture]))
    expected = sdipc.convert(sdipc.closed_form(bundle), features)
    for option in ((), ("--calibrate", "pinv"), ("--calibrate", "auto")):
        found = prompts(tmp_path, picture, "--model", tiny_folder, *option)["image_vectors"]
        np.testing.assert_array_equal(found, expected)


def copy(folder: Path, target: Path, **changed: Any) -> Path:
    """A checkpoint with other tensors in its CLIP."""
    shutil.copytree(folder, target)
    weights = load_file(target / "clip/model.safetensors")
    save_file(weights | changed, target / "clip/model.safetensors", metadata={"format": "pt"})
    return target


def test_dummies_are_refused(
    second: Path, tiny_folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(second / "clip/model.safetensors")
    last = {name: weights[name.replace(".2.", ".1.")] for name in weights if "text_model.encoder.layers.2." in name}
    copied = copy(second, tmp_path / "copied", **last)
    ones = {"text_projection.weight": np.ones((24, 24), np.float32)}
    constant, first = copy(second, tmp_path / "constant", **ones), copy(tiny_folder, tmp_path / "first", **ones)
    arguments = ("prompt", picture, "--output", tmp_path / "refused.safetensors", "--model")
    assert "found a dummy for layer 2, a copy of the one before" in refuse(capsys, *arguments, copied)
    for folder in (constant, first):
        assert "found a dummy text_projection" in refuse(capsys, *arguments, folder)


def test_a_clip_of_another_width(
    second: Path, picture: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads captions with its own tokenizer, which lies among its files as on the hub."""
    parts = tmp_path / "parts"
    plain = tiny_bundle(parts / "plain").config
    text = dataclasses.replace(plain.text, hidden_size=48, num_attention_heads=4)
    unet = dataclasses.replace(plain.unet, cross_attention_dim=48)
    sdipc.save(tiny_bundle(parts / "wide", text=text, unet=unet), tmp_path / "wide")
    clip = tmp_path / "wide/clip"
    for file in (tmp_path / "wide/tokenizer").iterdir():
        shutil.copy(file, clip)
    arguments = (picture, "--model", second, "--clip", clip, "--calibrate-captions", captions)
    words = "text_projection is (24, 48) but the UNet reads 24-wide prompts"
    assert words in refuse(capsys, "prompt", *arguments, "--output", tmp_path / "refused.safetensors")
    found = prompts(tmp_path, *arguments, "--calibrate", "ridge")
    assert found["prompt_embeds"].shape == (1, 20, 24)
    config = read_config(second, clip)
    assert load_text_tower(config).config.folder == str(clip)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--calibrate", "pinv"), "the inverse needs the last layer"),
        (("--cutoff", 0.1), "found --cutoff for a fitted map, which has none: leave it out\n"),
        (("--mode", "cspace"), "found --mode for a fitted map, which has none"),
        (("--calibrate-captions", "none.txt"), "none.txt: No such file or directory, expected a text file of captions"),
        (("--calibrate-pictures", "none"), "none: No such file or directory, expected a folder of at least 30"),
        (("--ridge", -1), "ridge is '-1', expected"),
    ],
)
def test_what_is_refused(
    second: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...], words: str,
) -> None:  # fmt: skip
    arguments = ("prompt", picture, "--model", second, "--output", tmp_path / "p.safetensors")
    assert words in refuse(capsys, *arguments, *options)


def test_what_a_map_alone_has_is_refused_for_the_inverse(
    tiny_folder: Path, picture: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("prompt", picture, "--model", tiny_folder, "--output", tmp_path / "p.safetensors")
    for options in (("--ridge", 0.5), ("--after-end", "own"), ("--calibrate-captions", captions)):
        assert f"found {options[0]} for the inverse, which has none" in refuse(capsys, *arguments, *options)


def test_one_vector_a_picture_where_they_are_stored(
    second: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.yaml"
    values = {"source": picture.parent, "model": second, "after_end": "own", "output_dir": tmp_path / "out"}
    job.write_text("".join(f"{name}: {value}\n" for name, value in values.items()) + "vectors: true\n")
    assert "after-end is 'own', which gives a picture a vector for each place" in refuse(capsys, "batch", job)
    assert not (tmp_path / "out").exists()


def test_each_places_own_state_is_mixed_place_by_place(
    second: Path, picture: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.png"
    Image.open(picture).rotate(90).save(other)
    options = ("--model", second, "--calibrate-captions", captions, "--after-end", "own")
    ends = [prompts(tmp_path, each, *options)["prompt_embeds"][0] for each in (picture, other)]
    seen: list[np.ndarray] = []

    def generate(mesh: Any, bundle: sdipc.Bundle, context: Any, report: Any, **asked: Any) -> Any:
        seen.extend(np.asarray(context))
        return np.random.default_rng(0).random((len(context), 32, 32, 3)), np.zeros(len(context), bool)

    monkeypatch.setattr(parallel, "generate", generate)
    sampling = ("--num-images", 1, "--mesh", "data=1", "--output-dir", tmp_path / "out", "--overwrite")
    assert run("interpolate", picture, other, "--frames", 3, *options, *sampling) == 0
    np.testing.assert_allclose(seen[0], ends[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seen[2], ends[1], rtol=1e-4, atol=1e-4)
    lengths = np.linalg.norm(np.stack(ends), axis=-1)
    # Halfway along the arc, which for vectors of one length is where their mean points to.
    halfway = ends[0] + ends[1]
    halfway *= (lengths[0] / np.linalg.norm(halfway, axis=-1))[:, None]
    np.testing.assert_allclose(seen[1], halfway, rtol=1e-3, atol=1e-3)
    seen.clear()
    assert run("mix", picture, other, *options, *sampling) == 0
    np.testing.assert_allclose(seen[0][1:], halfway[1:], rtol=1e-3, atol=1e-3)
    seen.clear()
    assert run("mix", picture, "--without", "a cat", other, *options, *sampling) == 0
    assert seen[0].shape == ends[0].shape
    assert relative_error(seen[0][1:], ends[0][1:]) > 0.01
