"""Winograd's convolutions: equal to plain ones, and used where they are meant to be."""

import dataclasses
from collections import Counter
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.sizes import small_sdxl
from flax import traverse_util
from measure_winograd import convolutions

from sdipc_jax import Bundle, generate, generate_with_progress, parallel
from sdipc_jax.models import UNet2DConditionModel, UNetConfig, VAEConfig, winograd
from sdipc_jax.models.vae import AutoencoderKL
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from tests.compare import relative_error
from tests.random_weights import random_params
from tests.tiny import quick_unet, tiny_bundle

# Two levels whose channels are enough, one for each size of tiles, and skips of other widths.
WIDE = UNetConfig(
    sample_size=8,
    block_out_channels=(256, 260),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    cross_attention_dim=24,
    attention_head_dim=(4, 4),
    layers_per_block=1,
)


def unet_inputs(height: int, width: int) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(0)
    shapes = (2, height, width, 4), (2, 3, 24)
    sample, context = (generator.standard_normal(shape, np.float32) for shape in shapes)
    return sample, np.array([7.0, 601.0], np.float32), context


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.tree.map(jnp.asarray, random_params(UNet2DConditionModel(WIDE), *unet_inputs(4, 4)))


def transformed_shapes(*arguments: Any) -> Any:
    """The shapes of what there would be."""
    return jax.eval_shape(partial(winograd.transformed, arguments[0]), *arguments[1:])


@pytest.mark.parametrize(
    "height, width, features, places, tiles",
    [
        (24, 24, 256, 36, 1024),
        (37, 26, 300, 36, 1024),
        (37, 26, 300, 36, 30),
        (25, 60, 256, 36, 5),
        (12, 12, 300, 16, 1024),
        (23, 13, 256, 16, 30),
        (14, 90, 300, 16, 1024),
    ],
)
def test_equals_the_sum_over_shifted_pictures(
    height: int, width: int, features: int, places: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strips of tiles too, of a single row, and where the last one reaches beyond the picture."""
    monkeypatch.setattr(winograd, "_TILES", tiles)
    generator = np.random.default_rng(height * width + features)
    x = generator.standard_normal((2, height, width, 256), np.float32)
    kernel = generator.standard_normal((3, 3, 256, features), np.float32) / np.float32(48)
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, height, width, features))
    for i in range(3):
        for j in range(3):
            expected += padded[:, i : i + height, j : j + width] @ kernel[i, j].astype(np.float64)
    transformed = winograd.transform_kernel(jnp.asarray(kernel), height, width)
    assert transformed is not None
    assert transformed.shape == (places, 256, features)
    # A function of its own: of `convolve` JAX would take the program of the case before, whatever the strips.
    found = jax.jit(lambda x, kernel: winograd.convolve(x, kernel))(x, transformed)
    assert found.shape == expected.shape
    assert relative_error(np.asarray(found), expected) <= 1e-5


def test_what_is_transformed(params: Any) -> None:
    kernels = transformed_shapes(UNet2DConditionModel(WIDE), params, *unet_inputs(25, 31))
    found = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(kernels).items()}
    fine = ("down_blocks_0/resnets_0", "up_blocks_1/resnets_0", "up_blocks_1/resnets_1")
    coarse = ("down_blocks_1/resnets_0", "mid_block/resnets_0", "mid_block/resnets_1")
    coarse += ("up_blocks_0/resnets_0", "up_blocks_0/resnets_1")
    expected = {f"{block}/{name}/kernel": 36 for block in fine for name in ("conv1", "conv2")}
    expected |= {f"{block}/{name}/kernel": 16 for block in coarse for name in ("conv1", "conv2")}
    # Neither strided convolutions nor 1 x 1, nor the first and the last with their few channels.
    expected["up_blocks_0/upsamplers_0/conv/kernel"] = 36
    assert {path: shape[0] for path, shape in found.items()} == expected
    for path, leaf in traverse_util.flatten_dict(kernels).items():
        assert leaf.shape[1:] == traverse_util.flatten_dict(params)[path].shape[2:]


def test_network_is_the_same(params: Any) -> None:
    model, inputs = UNet2DConditionModel(WIDE), unet_inputs(25, 31)
    kernels = jax.jit(partial(winograd.transformed, model))(params, *inputs)
    apply = jax.jit(model.apply)
    plain = np.asarray(apply({"params": params}, *inputs))
    found = np.asarray(apply({"params": params, winograd.COLLECTION: kernels}, *inputs))
    assert relative_error(found, plain) <= 1e-5
    assert not np.array_equal(found, plain)
    wrong = jax.tree.map(lambda leaf: leaf[::-1], kernels)
    assert relative_error(np.asarray(apply({"params": params, winograd.COLLECTION: wrong}, *inputs)), plain) > 0.1


def test_decoder_is_the_same() -> None:
    config = VAEConfig(
        block_out_channels=(8, 256),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    model, latents = AutoencoderKL(config), np.random.default_rng(0).standard_normal((1, 13, 15, 4), np.float32)
    params = jax.tree.map(jnp.asarray, random_params(model, np.zeros((1, 4, 4, 3), np.float32)))
    kernels = jax.jit(partial(winograd.transformed, model, method="decode"))(params, latents)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(kernels)} == {16, 36}
    decode = jax.jit(partial(model.apply, method="decode"))
    found = decode({"params": params, winograd.COLLECTION: kernels}, latents)
    assert relative_error(np.asarray(found), np.asarray(decode({"params": params}, latents))) <= 1e-5


def test_nothing_is_transformed_where_it_gains_nothing(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UNet2DConditionModel(WIDE)
    assert not transformed_shapes(model, params, *unet_inputs(11, 40))
    narrow = jax.tree.map(lambda leaf: leaf[..., :255], params)
    assert not transformed_shapes(model, narrow, *unet_inputs(25, 31))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert not transformed_shapes(model.clone(dtype=jnp.bfloat16), half, *unet_inputs(25, 31))
    monkeypatch.setattr(winograd, "platform", lambda: "tpu")
    assert not transformed_shapes(model, params, *unet_inputs(25, 31))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    unet = dataclasses.replace(quick_unet(WIDE), block_out_channels=(256,))
    return tiny_bundle(tmp_path_factory.mktemp("wide"), unet=unet)


SETTINGS: dict[str, Any] = {"height": 100, "width": 96, "steps": 2, "guidance_scale": 1.0}
SETTINGS |= {"seeds": 3, "indices": np.arange(2)}


def test_pictures_are_the_same(wide: Bundle) -> None:
    context = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 24), np.float32))
    request, state = begin(wide, context, **SETTINGS)
    assert request.winograd
    plain = dataclasses.replace(request, winograd={})
    expected, _ = finish(wide, advance(wide, plain, state, 0, request.evaluations))
    np.testing.assert_allclose(generate(wide, context, **SETTINGS), expected, atol=1e-4)
    divided, _ = parallel.generate(parallel.make_mesh("data=2"), wide, context, **SETTINGS)
    np.testing.assert_allclose(divided, expected, atol=1e-4)


@pytest.mark.parametrize("way", ["generate", "generate_with_progress", "mesh"])
def test_kernels_are_gone_when_pictures_are_decoded(wide: Bundle, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = jnp.zeros((2, 20, 24))
    alive: list[int] = []

    def count(bundle: Bundle, state: Any) -> Any:
        jax.block_until_ready(state)
        alive.append(sum(array.ndim == 3 and array.shape[0] == 36 for array in jax.live_arrays()))
        return jnp.zeros((2, 100, 96, 3)), jnp.zeros(2, bool)

    for module in ("sdipc_jax.sampling.sample", "sdipc_jax.parallel.sampling"):
        monkeypatch.setattr(import_module(module), "finish", count)
    request, _ = begin(wide, context, **SETTINGS)
    kernels = len(jax.tree.leaves(request.winograd))
    del request
    if way == "mesh":
        parallel.generate(parallel.make_mesh("data=1"), wide, context, **SETTINGS)
    else:
        made = {"generate": generate, "generate_with_progress": partial(generate_with_progress, report=count_nothing)}
        made[way](wide, context, **SETTINGS)
    assert kernels > 0
    assert alive == [0]


def test_convolutions_that_are_timed_are_those_of_the_network() -> None:
    config = small_sdxl("float32")
    expected: Counter[tuple[int, ...]] = Counter()
    for path, leaf in traverse_util.flatten_dict(config.abstract_params()["unet"]).items():
        if leaf.shape[:2] == (3, 3) and "downsamplers_0" not in path:
            expected[leaf.shape[2:]] += 1
    found: Counter[tuple[int, ...]] = Counter()
    for shape, calls in convolutions(config).items():
        found[shape.channels, shape.features] += calls
    assert found == expected
    assert {shape.side for shape in convolutions(config)} == {16, 8, 4}


def count_nothing(done: int, total: int) -> None:
    """A progress bar."""
