"""ControlNets: zeros change nothing, scales and intervals are data, and networks for others are refused."""

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sdipc_jax as sdipc
from sdipc_jax import Bundle, InputError, cli, parallel
from sdipc_jax.checkpoints.controlnets import load_controlnets, with_controlnets
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.keys import flatten
from sdipc_jax.checkpoints.names_ldm import unet_names
from sdipc_jax.commands import opening
from sdipc_jax.pictures.guiding import find_edges
from sdipc_jax.sampling import Control, control, start_from
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from tests import start_cases
from tests.control_cases import picture, random_network, write_controlnet
from tests.tiny import SMALL_UNET, quick_unet, tiny_bundle, tiny_sdxl

SETTINGS: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "seeds": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("control") / "parts", unet=quick_unet(SMALL_UNET))


@pytest.fixture(scope="module")
def folder(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_controlnet(tmp_path_factory.mktemp("network") / "one", plain.config)


@pytest.fixture(scope="module")
def bundle(plain: Bundle, folder: Path) -> Bundle:
    return sdipc.add_controlnet(plain, folder)


@pytest.fixture(scope="module")
def context(plain: Bundle) -> jax.Array:
    return sdipc.text_prompt(plain, sdipc.tokenize(plain, ["a", "b"]))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([picture(0), picture(1)]) / np.float32(255)


def latents(bundle: Bundle, context: jax.Array, **settings: Any) -> np.ndarray:
    request, state = begin(bundle, context, **SETTINGS | settings)
    return np.asarray(advance(bundle, request, state, 0, request.evaluations)[0])


def test_scale_0_and_networks_that_were_not_trained_yet_change_nothing(
    plain: Bundle, bundle: Bundle, context: jax.Array, pictures: np.ndarray
) -> None:
    expected = latents(plain, context)
    np.testing.assert_allclose(latents(bundle, context, controls=[Control(pictures, 0.0)]), expected, atol=1e-5)
    found = latents(bundle, context, controls=[Control(pictures)])
    assert np.abs(found - expected).max() > 0.1

    # As training begins: what comes out of it goes through convolutions that are zeros.
    network = {
        name: jax.tree.map(np.zeros_like, tree) if name.startswith(("controlnet_down", "controlnet_mid")) else tree
        for name, tree in bundle.params["controlnets"]["0"].items()
    }
    untrained = dataclasses.replace(bundle, params=bundle.params | {"controlnets": {"0": network}})
    np.testing.assert_allclose(latents(untrained, context, controls=[Control(pictures)]), expected, atol=1e-5)


def test_rows_differ_in_picture_scale_and_interval_in_one_program(
    bundle: Bundle, context: jax.Array, pictures: np.ndarray
) -> None:
    together = latents(bundle, context, controls=[Control(pictures, [0.5, 1.0], [0.0, 0.5], [0.5, 1.0])])
    compiled = advance._cache_size()  # type: ignore[attr-defined]
    for row, (scale, start, end) in enumerate([(0.5, 0.0, 0.5), (1.0, 0.5, 1.0)]):
        alone = latents(bundle, context, controls=[Control(pictures[row : row + 1], scale, start, end)])
        np.testing.assert_array_equal(alone[row], together[row])
        assert np.abs(alone[1 - row] - together[1 - row]).max() > 1e-3
    assert advance._cache_size() == compiled  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "start, end, counts",
    [
        (0.0, 1.0, [1, 1, 1, 1, 1]),
        # As diffusers counts: 0/5 < 0.2 <= 1/5, and 3/5 <= 0.7 < 4/5.
        (0.2, 0.7, [0, 1, 1, 0, 0]),
        (0.3, 0.6, [0, 0, 1, 0, 0]),
        (0.9, 1.0, [0, 0, 0, 0, 0]),
    ],
)
def test_evaluations_at_which_a_network_counts(
    bundle: Bundle, pictures: np.ndarray, start: float, end: float, counts: list[int]
) -> None:
    (found,) = control.condition(bundle, [Control(pictures, 0.5, start, end)], 2, 5, (32, 32))
    np.testing.assert_array_equal(found.scale, 0.5 * np.array([counts] * 2, np.float32))


def test_two_networks_add_up(
    plain: Bundle, bundle: Bundle, context: jax.Array, pictures: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    other = write_controlnet(tmp_path / "other", plain.config, seed=1)
    both = sdipc.add_controlnet(bundle, other)
    off = [Control(pictures, 0.7), Control(pictures[::-1], 0.0)]
    expected = latents(bundle, context, controls=off[:1])
    np.testing.assert_allclose(latents(both, context, controls=off), expected, atol=1e-5)
    swapped = sdipc.add_controlnet(sdipc.add_controlnet(plain, other), folder)
    on = [Control(pictures, 0.7), Control(pictures[::-1], 0.3)]
    found = latents(both, context, controls=on)
    assert np.abs(found - expected).max() > 1e-3
    np.testing.assert_allclose(latents(swapped, context, controls=on[::-1]), found, atol=1e-4)


def test_with_all_else(bundle: Bundle, context: jax.Array, pictures: np.ndarray) -> None:
    controls = [Control(pictures, 0.5)]
    whole = latents(bundle, context, controls=controls)
    # Every evaluation is a whole one.
    np.testing.assert_allclose(latents(bundle, context, controls=controls, guidance_interval=(0, 1)), whole, atol=1e-5)
    kept = latents(bundle, context, controls=controls, cache_interval=2)
    assert 1e-4 < np.abs(kept - whole).mean() < 0.5
    start = start_from(bundle, start_cases.picture()[None].repeat(2, 0) / np.float32(255), 0.5)
    begun = latents(bundle, context, controls=controls, start=start)
    assert np.abs(begun - latents(bundle, context, controls=[Control(pictures, -0.5)], start=start)).max() > 1e-2


def test_on_any_mesh(bundle: Bundle, context: jax.Array, pictures: np.ndarray) -> None:
    controls = [Control(pictures, [0.5, 1.0], 0.0, 0.8)]
    together = sdipc.generate(bundle, context, controls=controls, **SETTINGS)
    meshed, _ = parallel.generate(parallel.make_mesh("data=2"), bundle, context, controls=controls, **SETTINGS)
    np.testing.assert_allclose(meshed, together, atol=2.5 / 255)


def test_a_file_is_the_folder(plain: Bundle, bundle: Bundle, folder: Path) -> None:
    expected = flatten(bundle.params["controlnets"]["0"])
    weights = folder / "diffusion_pytorch_model.safetensors"
    found = sdipc.add_controlnet(plain, weights)
    assert found.config.controlnets[0].network == bundle.config.controlnets[0].network
    jax.tree.map(np.testing.assert_array_equal, flatten(found.params["controlnets"]["0"]), expected)


def test_digests_cover_the_network(tiny: Bundle, tmp_path: Path) -> None:
    config = with_controlnets(tiny.config, [write_controlnet(tmp_path / "network", tiny.config)])
    found, without = digests(config, None), digests(tiny.config, None)
    assert found.items() > without.items()
    assert [name for name in found if name not in without] == [
        "controlnet/1/config.json",
        "controlnet/1/diffusion_pytorch_model.safetensors",
    ]


def test_files_with_the_authors_names(plain: Bundle, tmp_path: Path) -> None:
    """Their hints have three convolutions of stride 2, as pictures have 8 pixels a latent."""
    vae = dataclasses.replace(
        plain.config.vae,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    config = dataclasses.replace(plain.config, vae=vae)
    network, weights = random_network(config, 2)
    names = unet_names(weights, network.layers_per_block)
    assert names["controlnet_cond_embedding.blocks.5.weight"].name == "input_hint_block.12.weight"
    file = tmp_path / "control.safetensors"
    save_file({f"control_model.{names[name].name}": value for name, value in weights.items()}, file)
    beside = with_controlnets(config, [file])
    assert beside.controlnets[0].network == network
    kernel = load_controlnets(beside)["0"]["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, weights["down_blocks.0.resnets.0.conv1.weight"].transpose(2, 3, 1, 0))


def test_networks_of_sdxl(plain: Bundle, folder: Path, tmp_path: Path) -> None:
    """They read a pooled text and sizes too; others are refused, and they beside others."""
    vae = dataclasses.replace(
        plain.config.vae,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    sdxl = tiny_sdxl(tmp_path / "parts", vae=vae).config
    network, weights = random_network(sdxl, 3)
    assert network.addition_embed_type == "text_time"
    names = unet_names(weights, network.layers_per_block)
    assert names["add_embedding.linear_1.weight"].name == "label_emb.0.0.weight"
    by_authors, by_diffusers = tmp_path / "authors.safetensors", tmp_path / "diffusers.safetensors"
    save_file({f"control_model.{names[name].name}": value for name, value in weights.items()}, by_authors)
    save_file(weights, by_diffusers)
    for file in (by_authors, by_diffusers):
        beside = with_controlnets(sdxl, [file])
        assert beside.controlnets[0].network == network
        kernel = load_controlnets(beside)["0"]["add_embedding"]["linear_1"]["kernel"]
        np.testing.assert_array_equal(kernel, weights["add_embedding.linear_1.weight"].T)
        with pytest.raises(InputError, match=r"block_out_channels is \(16, 32\), expected the checkpoint's \(16,\)"):
            with_controlnets(plain.config, [file])
    whole = write_controlnet(tmp_path / "network", sdxl)
    with pytest.raises(InputError, match="cross_attention_dim is 64, expected the checkpoint's 24: use a ControlNet"):
        with_controlnets(plain.config, [whole])
    with pytest.raises(InputError, match="cross_attention_dim is 24, expected the checkpoint's 64: use a ControlNet"):
        with_controlnets(sdxl, [folder])


def test_networks_that_do_not_fit(plain: Bundle, folder: Path, tmp_path: Path) -> None:
    wider = dataclasses.replace(plain.config, unet=dataclasses.replace(plain.config.unet, cross_attention_dim=32))
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(InputError, match="cross_attention_dim is 24, expected the checkpoint's 32"):
            with_controlnets(wider, [source])
    broader = dataclasses.replace(plain.config, unet=dataclasses.replace(plain.config.unet, block_out_channels=(32,)))
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(InputError, match=r"block_out_channels is \(16,\), expected the checkpoint's \(32,\)"):
            with_controlnets(broader, [source])
    with pytest.raises(InputError, match="no such folder or file"):
        with_controlnets(plain.config, [tmp_path / "none"])
    values = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"_class_name": "T2IAdapter"}, "found a T2IAdapter, expected a ControlNetModel"),
        ({"conditioning_channels": 1}, "conditioning_channels is 1, only 3 is supported"),
        ({"sample_size": 8}, "sample_size is not an option of ControlNetModel"),
        ({"controlnet_conditioning_channel_order": "grb"}, "channel_order is 'grb', expected rgb or bgr"),
        ({"conditioning_embedding_out_channels": [4, 8]}, "is 2, expected the checkpoint's 4"),
    ):
        other = tmp_path / words[:12].replace(" ", "")
        other.mkdir()
        (other / "config.json").write_text(json.dumps(values | changes))
        (other / "diffusion_pytorch_model.safetensors").symlink_to(folder / "diffusion_pytorch_model.safetensors")
        with pytest.raises(InputError, match=words):
            with_controlnets(plain.config, [other])
    for name, words in (("lora_controlnet", "found a Control-LoRA"), ("a", "found no controlnet_cond_embedding")):
        save_file({name: np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match=words):
            with_controlnets(plain.config, [tmp_path / "other.safetensors"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scale": math.inf}, "the control's scale is inf, expected a finite number"),
        ({"scale": [1.0, 2.0, 3.0]}, r"has shape \(3,\), expected \(2,\)"),
        ({"start": -0.1}, "the control's start is -0.1, expected 0 to 1"),
        ({"start": 0.5, "end": 0.5}, "start is 0.5 and its end 0.5, expected start < end"),
        ({"pictures": np.zeros((2, 16, 32, 3))}, r"shape \(2, 16, 32, 3\), expected \(2, 32, 32, 3\), or one for all"),
    ],
)
def test_refusals(bundle: Bundle, context: jax.Array, pictures: np.ndarray, change: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        begin(bundle, context, controls=[dataclasses.replace(Control(pictures), **change)], **SETTINGS)


def test_one_control_for_each_network(bundle: Bundle, context: jax.Array, pictures: np.ndarray) -> None:
    with pytest.raises(InputError, match="found 2 controls for 1 ControlNets, expected one for each"):
        begin(bundle, context, controls=[Control(pictures)] * 2, **SETTINGS)


@pytest.fixture
def shown(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The controls of each batch of a command, which samples nothing and loads no networks."""
    found = []

    def generate(mesh: Any, bundle: Bundle, context: Any, report: Any, **settings: Any) -> Any:
        found.append(settings["controls"])
        return np.zeros((len(context), 32, 32, 3)), np.zeros(len(context), bool)

    monkeypatch.setattr(parallel, "generate", generate)
    monkeypatch.setattr(opening, "load_weights", lambda config, tuned: tiny)
    return found


def command(tiny_folder: Path, out: Path, *arguments: object) -> int:
    options = ["--model", tiny_folder, "--output-dir", out, "--num-images", 1, "--steps", 2, "--quiet"]
    return cli.main([*map(str, ["text", "a", *options, *arguments])])


def test_options_become_controls(tiny: Bundle, tiny_folder: Path, shown: list[Any], tmp_path: Path) -> None:
    network = write_controlnet(tmp_path / "network", tiny.config)
    Image.fromarray(picture(0)).save(tmp_path / "lines.png")
    step = np.zeros((64, 48, 3), np.uint8)
    step[:, 24:] = 255
    Image.fromarray(step).save(tmp_path / "step.png")
    images = [tmp_path / "lines.png", tmp_path / "step.png"]
    options: list[object] = ["--controlnet", network, network, "--control-image", *images]
    options += ["--control-detector", "none", "canny", "--control-scale", 0.5, "--control-end", 0.6, 1.0]
    assert command(tiny_folder, tmp_path / "out", *options) == 0
    ((first, second),) = shown
    np.testing.assert_array_equal(first.pictures, picture(0)[None] / np.float32(255))
    assert (first.scale, first.start, first.end, second.scale, second.end) == (0.5, 0.0, 0.6, 0.5, 1.0)
    # One line of white, down the middle.
    assert second.pictures.shape == (1, 32, 32, 3)
    assert set(np.unique(second.pictures)) == {0.0, 1.0}
    assert set(np.nonzero(second.pictures[0, 4:-4])[1].tolist()) <= {15, 16}
    record = json.loads((tmp_path / "out/manifest.jsonl").read_text().splitlines()[0])
    assert record["control_sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in images]
    assert "controlnet/2/config.json" in record["checkpoint"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--controlnet", "{network}"], "found 0 values of control_image and 1 of controlnet, expected one picture"),
        (["--control-image", "{image}"], "found 1 values of control_image and 0 of controlnet"),
        (["--controlnet", "{network}", "--control-image", "{none}"], "none.png"),
        (["--controlnet", "{none}", "--control-image", "{image}"], "no such folder or file"),
        (
            ["--control-start", "0.5", "--control-end", "0.5"],
            "control_start is 0.5 and control_end 0.5, expected start",
        ),
        (["--control-scale", "1", "2"], "found 2 values of control_scale, expected one, or one for each of 1 networks"),
        (["--control-scale", "inf"], "control_scale"),
    ],
)
def test_options_that_are_refused(
    tiny: Bundle,
    tiny_folder: Path,
    tmp_path: Path,
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = write_controlnet(tmp_path / "network", tiny.config)
    Image.fromarray(picture(0)).save(tmp_path / "image.png")
    places = {"network": network, "image": tmp_path / "image.png", "none": tmp_path / "none.png"}
    if options[0].startswith("--control-s"):
        options = ["--controlnet", "{network}", "--control-image", "{image}", *options]
    assert command(tiny_folder, tmp_path / "out", *(option.format(**places) for option in options)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_detector_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(InputError, match=r"expected the package scikit-image.*pip install 'sdipc-jax\[canny\]'"):
        find_edges(Image.new("RGB", (32, 32)))
