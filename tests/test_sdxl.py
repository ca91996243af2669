"""SDXL: whole pictures as PyTorch makes them (golden file), prompts of more than one array, what is told of sizes."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import for_sampling
from sdipc_jax.models import CLIPTextConfig, CLIPTextModelWithProjection, UNet2DConditionModel, UNetConfig
from sdipc_jax.models.given import shapes
from sdipc_jax.prompts.contexts import end_positions
from sdipc_jax.prompts.prompt import abstract_prompt
from sdipc_jax.sampling.request import begin
from tests import sdxl_cases
from tests.tiny import tiny_sdxl

GOLDEN = Path(__file__).parent / "golden/families.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_cases.write_checkpoints(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> sdipc.Bundle:
    return sdxl_cases.bundle_of(folder / "sdxl")


def vectors_of(bundle: sdipc.Bundle, count: int) -> np.ndarray:
    """As `convert` gives them: of both towers, and the pooled one."""
    return np.random.default_rng(count).standard_normal((count, 24 + 40 + 32), np.float32)


@pytest.mark.parametrize("name", sdxl_cases.PICTURES)
def test_pictures_equal_pytorch(folder: Path, name: str) -> None:
    with np.load(GOLDEN) as golden:
        difference = 255 * np.abs(sdxl_cases.make(folder, name) - golden[name])
    assert difference.mean() <= 0.01


def test_a_saved_folder_loads_as_it_was(bundle: sdipc.Bundle, tmp_path: Path) -> None:
    first = tiny_sdxl(tmp_path / "parts")
    assert dataclasses.replace(bundle.config, folder="", tokens_2=None) == dataclasses.replace(
        first.config, folder="", tokens_2=None
    )
    assert bundle.config.tokens_2 == first.config.tokens_2
    jax.tree.map(np.testing.assert_array_equal, bundle.params, first.params)


def test_each_tower_has_its_own_tokens(bundle: sdipc.Bundle) -> None:
    tokens, special = sdipc.tokenize(bundle, ["a!", ""]), bundle.config.towers
    assert tokens.shape == (2, 2, 20)
    pads = [each.pad for _, each in special]
    assert pads[0] == special[0][1].end
    assert pads[1] == 0
    assert (tokens[1, :, 2:] == np.array(pads)[:, None]).all()
    # What the second tower pads with is a word by itself there, and the last letter of one in the first.
    assert tokens[0, 1, 2] == 0 != tokens[0, 0, 2]


def test_a_negative_prompt_left_out_is_zeros_and_an_empty_one_is_not(bundle: sdipc.Bundle) -> None:
    left_out = sdipc.negative_prompt(bundle)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(left_out))
    empty = sdipc.negative_prompt(bundle, sdipc.tokenize(bundle, [""]))
    jax.tree.map(np.testing.assert_array_equal, empty, sdipc.empty_prompt(bundle))
    assert np.abs(np.asarray(empty.pooled)).max() > 0.1
    encoded = dataclasses.replace(bundle.config, force_zeros_for_empty_prompt=False)
    jax.tree.map(np.testing.assert_array_equal, sdipc.negative_prompt(sdipc.Bundle(bundle.params, encoded)), empty)
    some = sdipc.negative_prompt(bundle, sdipc.tokenize(bundle, ["", "a"]), given=np.array([False, True]))
    assert not np.asarray(some.context[0]).any()
    assert not np.asarray(some.pooled[0]).any()
    assert np.asarray(some.context[1]).any()


def test_a_picture_stands_after_the_start_and_in_the_pooled_vector(bundle: sdipc.Bundle) -> None:
    vectors = vectors_of(bundle, 2)
    prompt = sdipc.image_prompt(bundle, vectors)
    start = np.asarray(sdipc.empty_prompt(bundle).context)[0, 0]
    np.testing.assert_array_equal(prompt.context[:, 0], np.stack([start] * 2))
    np.testing.assert_array_equal(prompt.context[:, 1:], np.repeat(vectors[:, None, :64], 19, axis=1))
    np.testing.assert_array_equal(prompt.pooled, vectors[:, 64:])
    same = sdipc.edit_prompt(bundle, vectors, sdipc.tokenize(bundle, [""]), 0.0)
    jax.tree.map(np.testing.assert_array_equal, same, prompt)


def test_a_text_changes_a_picture_from_each_towers_own_end_on(bundle: sdipc.Bundle) -> None:
    # Three tokens for the second tower, whose pad is a word by itself; as many letters for the first.
    tokens, vectors = sdipc.tokenize(bundle, ["ab!"]), vectors_of(bundle, 1)
    tokens[:, 1, 4:6] = [0, bundle.config.towers[1][1].end]
    text, edited = sdipc.text_prompt(bundle, tokens), sdipc.edit_prompt(bundle, vectors, tokens, 0.5)
    start = np.asarray(sdipc.empty_prompt(bundle).context)[0, 0]
    for tower, part in enumerate((slice(0, 24), slice(24, 64))):
        end = int(end_positions(tokens[:, tower], bundle.config.towers[tower][1].end)[0])
        assert end == 4 + tower
        expected = np.array(text.context[0, :, part])
        expected[0] = start[part]
        expected[end:] = vectors[0, part] + np.float32(0.5) * expected[end]
        np.testing.assert_allclose(edited.context[0, :, part], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(edited.pooled, vectors[:, 64:] + 0.5 * text.pooled, rtol=1e-6)


def test_sizes_default_to_those_of_the_picture_and_the_negative_ones_to_the_positive(bundle: sdipc.Bundle) -> None:
    prompt = sdipc.image_prompt(bundle, vectors_of(bundle, 2))
    request, _ = begin(bundle, prompt, seeds=0, height=24, width=40)
    np.testing.assert_array_equal(request.added["time_ids"], [[24, 40, 0, 0, 24, 40]] * 4)
    np.testing.assert_array_equal(request.added["text_embeds"][2:], prompt.pooled)
    sized = prompt.with_sizes((512, 700), [[1, 2], [3, 4]], (5, 6))
    request, _ = begin(bundle, sized, seeds=0)
    expected = [[512, 700, 5, 6, 1, 2], [512, 700, 5, 6, 3, 4]]
    np.testing.assert_array_equal(request.added["time_ids"], expected * 2)
    negative = sdipc.negative_prompt(bundle).with_sizes((9, 9), (8, 8))
    request, _ = begin(bundle, sized, negative=negative, seeds=0)
    np.testing.assert_array_equal(request.added["time_ids"][:2], [[9, 9, 0, 0, 8, 8]] * 2)
    # Without guidance there are no negative prompts.
    request, _ = begin(bundle, sized, seeds=0, guidance_scale=1.0)
    np.testing.assert_array_equal(request.added["time_ids"], expected)


def test_rows_of_a_prompt_are_taken_as_of_an_array(bundle: sdipc.Bundle) -> None:
    prompt = sdipc.image_prompt(bundle, vectors_of(bundle, 3)).with_sizes((32, 32), (32, 32))
    picked = prompt[np.array([2, 0, 2])]
    assert len(prompt) == len(picked) == 3
    np.testing.assert_array_equal(picked.pooled, np.asarray(prompt.pooled)[[2, 0, 2]])
    assert [len(each) for each in prompt] == [1, 1, 1]
    np.testing.assert_array_equal(list(prompt)[1].context, prompt.context[1:2])


def test_another_kind_of_checkpoints_prompt_is_refused(bundle: sdipc.Bundle, folder: Path) -> None:
    prompt = sdipc.image_prompt(bundle, vectors_of(bundle, 1))
    with pytest.raises(sdipc.InputError, match="expected a Prompt, as SDXL reads"):
        sdipc.generate(bundle, prompt.context, seeds=0)
    other = sdxl_cases.bundle_of(folder / "sd2")
    with pytest.raises(sdipc.InputError, match="expected an array, as this checkpoint reads"):
        sdipc.generate(other, prompt, seeds=0)
    wrong = dataclasses.replace(prompt, pooled=prompt.pooled[:, :5])
    with pytest.raises(sdipc.InputError, match=r"text_embeds of shape \(1, 5\), expected \(1, 32\)"):
        sdipc.generate(bundle, wrong, seeds=0)


def test_the_autoencoder_is_float32_where_its_file_asks_for_that(folder: Path) -> None:
    half = sdipc.load(folder / "sdxl", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params["vae"])} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params["unet"])} == {jnp.dtype("bfloat16")}
    asked = sdipc.load(folder / "sdxl", dtype="bfloat16", vae_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(asked.params["vae"])} == {jnp.dtype("bfloat16")}
    # Stable Diffusion 2's file asks too, by default, and is not heard in diffusers either.
    other = sdipc.load(folder / "sd2", dtype="bfloat16")
    assert other.config.vae.force_upcast
    assert {leaf.dtype for leaf in jax.tree.leaves(other.params["vae"])} == {jnp.dtype("bfloat16")}


def test_sampling_needs_no_towers(bundle: sdipc.Bundle) -> None:
    small = for_sampling(bundle)
    assert set(small.params) == {"unet", "vae"}
    prompts: Any = jax.tree.map(lambda each: jnp.zeros(each.shape), abstract_prompt(bundle.config, 1))
    request, _ = begin(small, prompts, seeds=0)
    assert request.context.shape == (2, 20, 64)


def test_the_refiner_is_refused_by_what_its_unet_reads(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "refiner"
    shutil.copytree(folder / "sdxl", copy)
    file = copy / "unet/config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"projection_class_embeddings_input_dim": 32 + 5 * 8}))
    with pytest.raises(sdipc.InputError, match="as SDXL's refiner does"):
        sdipc.load(copy)
    file.write_text(json.dumps(values | {"projection_class_embeddings_input_dim": 99}))
    with pytest.raises(sdipc.InputError, match="reads 51-wide pooled texts and text_encoder_2 gives 32"):
        sdipc.load(copy)
    # What published files write where a flag is meant.
    file.write_text(json.dumps(values | dict.fromkeys(("upcast_attention", "dual_cross_attention"))))
    assert sdipc.load(copy).config.unet.upcast_attention is False


def test_a_dummy_projection_of_the_second_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dummy"
    shutil.copytree(folder / "sdxl", copy)
    file = copy / "text_encoder_2/model.safetensors"
    weights = load_file(file)
    shape = weights["text_projection.weight"].shape
    # Constant, and of rank 1.
    for dummy in (np.ones(shape), np.outer(np.arange(1, shape[0] + 1), np.linspace(-1, 2, shape[1]))):
        save_file(weights | {"text_projection.weight": dummy.astype(np.float32)}, file)
        with pytest.raises(sdipc.InputError, match="text_encoder_2: found a dummy text_projection"):
            sdipc.load(copy)


def test_full_sizes_have_as_many_parameters_as_published() -> None:
    unet = UNetConfig(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    assert count_of(
        UNet2DConditionModel(unet), ((1, 8, 8, 4), "float32"), ((1,), "float32"), ((1, 1, 2048), "float32"),
        text_embeds=((1, 1280), "float32"), time_ids=((1, 6), "float32"),
    ) == 2_567_463_684  # fmt: skip
    big_g = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    assert count_of(CLIPTextModelWithProjection(big_g), ((1, 77), "int32"), ((1,), "int32")) == 694_659_840


def count_of(module: Any, *inputs: Any, **named: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(module, *inputs, **named)))
