"""The networks against PyTorch, live: other seeds than the golden files hold, full sizes, bfloat16."""

import dataclasses
import gc
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdipc_jax.models import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, UNetConfig, winograd
from sdipc_jax.models import UNet2DConditionModel as UNet
from tests import cases
from tests.cases import Case, decode_after_encode
from tests.compare import relative_error
from tests.parity import oracle
from tests.random_weights import random_params

Measured = Callable[[str, float], float]
GROUPS = {
    "block": (cases.block_cases, oracle.run_block),
    "unet": (cases.unet_cases, oracle.run_unet),
    "sdxl unet": (cases.sdxl_unet_cases, oracle.run_unet),
    "vae": (cases.vae_cases, oracle.run_vae),
    "text": (cases.text_cases, oracle.run_text),
    "vision": (cases.vision_cases, oracle.run_vision),
}
NETWORKS = [name for name in GROUPS if name != "block"]
BFLOAT16_ALLOWANCE = 1.25


def _reseeded(case: Case, seed: int) -> Case:
    """The same network with other weights and inputs."""
    generator = np.random.default_rng(seed)

    def redraw(x: np.ndarray) -> np.ndarray:
        if x.dtype == np.int32:
            return generator.permuted(x, axis=-1)
        # Timesteps stay.
        return x if x.ndim < 2 else np.float32(x.std()) * generator.standard_normal(x.shape, np.float32)

    inputs = tuple(redraw(x) for x in case.inputs)
    weights = partial(random_params, case.module, *inputs, seed=seed, **case.named)
    return dataclasses.replace(case, inputs=inputs, weights=weights)


def _outputs(case: Case, dtype: Any = jnp.float32) -> list[np.ndarray]:
    module = case.module if dtype == jnp.float32 else case.module.clone(dtype=dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), case.params)
    function = decode_after_encode(module) if hasattr(module, "encode") else module.apply
    return jax.tree.leaves(dataclasses.replace(case, weights=lambda: params).run(function))


@pytest.mark.parametrize("group", GROUPS)
def test_networks_equal_pytorch(group: str, measured: Measured) -> None:
    make, run = GROUPS[group]
    for seed, case in enumerate(make()):
        case = _reseeded(case, 100 + seed)
        expected = run(case)
        for found, wanted in zip(_outputs(case), expected if group == "vae" else [expected], strict=True):
            assert measured(f"{group}, float32", relative_error(found, wanted)) <= 1e-5, case.name


def test_sdxl_text_towers_equal_pytorch(measured: Measured) -> None:
    for seed, case in enumerate(cases.sdxl_text_cases()):
        case = dataclasses.replace(case, weights=partial(random_params, case.module, *case.inputs, seed=200 + seed))
        found = case.run(cases.sdxl_states(case.module))
        for mine, wanted in zip(found, oracle.run_sdxl_text(case), strict=True):
            assert measured("SDXL's text towers, float32", relative_error(mine, wanted)) <= 1e-5, case.name


@pytest.mark.parametrize("height, width", [(33, 24), (13, 16)])
def test_winograd_equals_pytorch(height: int, width: int, measured: Measured) -> None:
    generator = np.random.default_rng(height)
    x = generator.standard_normal((2, height, width, 260), np.float32)
    kernel = generator.standard_normal((3, 3, 260, 300), np.float32) / np.float32(48)
    weight = torch.tensor(kernel).permute(3, 2, 0, 1)
    expected = oracle.nhwc(torch.nn.functional.conv2d(oracle.nchw(x), weight, padding=1))
    transformed = winograd.transform_kernel(jnp.asarray(kernel), height, width)
    assert transformed is not None
    found = np.asarray(winograd.convolve(jnp.asarray(x), transformed))
    assert measured("winograd, float32", relative_error(found, expected)) <= 1e-5


@pytest.mark.parametrize("group", NETWORKS)
def test_bfloat16_is_as_near_to_float64_as_pytorch_is(group: str, measured: Measured) -> None:
    make, run = GROUPS[group]
    for case in make():
        if group in ("vae", "vision"):
            # A few numbers' rounding is a matter of luck.
            shape = (16, *case.inputs[0].shape[1:])
            case = dataclasses.replace(case, inputs=(np.random.default_rng(8).standard_normal(shape, np.float32),))
        elif case.named:
            sample, *others = (np.repeat(each, 16, axis=0) for each in case.inputs)
            sample = np.random.default_rng(8).standard_normal(sample.shape, np.float32)
            named = {name: np.repeat(value, 16, axis=0) for name, value in case.named.items()}
            case = dataclasses.replace(case, inputs=(sample, *others), named=named)
        # The mean of the latents, and not pictures made of it: by then the two have gone different ways.
        exact, rounded, found = (
            outputs[0] if isinstance(outputs, tuple | list) else outputs
            for outputs in (run(case, torch.float64), run(case, torch.bfloat16), _outputs(case, jnp.bfloat16))
        )
        ratio = relative_error(found, exact) / relative_error(rounded, exact)
        assert measured(f"{group}, bfloat16, ratio to PyTorch's error", ratio) <= BFLOAT16_ALLOWANCE, case.name


def test_bfloat16_decoder_is_as_near_to_float64_as_pytorch_is(measured: Measured) -> None:
    for case in cases.vae_cases():
        config, f = case.module.config, case.module.config.downscale
        _, height, width, _ = case.inputs[0].shape
        shape = (2, height // f, width // f, config.latent_channels)
        latents = np.random.default_rng(7).standard_normal(shape, np.float32)
        exact, rounded = (
            oracle.nhwc(oracle.vae(case).to(dtype).decode(oracle.nchw(latents).to(dtype)).sample)
            for dtype in (torch.float64, torch.bfloat16)
        )
        module = case.module.clone(dtype=jnp.bfloat16)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), case.params)
        found = jax.jit(lambda params, x, module=module: module.apply({"params": params}, x, method="decode"))(
            params, latents
        )
        ratio = relative_error(np.asarray(found, np.float64), exact) / relative_error(rounded, exact)
        assert measured("vae decoder, bfloat16, ratio to PyTorch's error", ratio) <= BFLOAT16_ALLOWANCE, case.name


def _full_size(module: Any, inputs: tuple[np.ndarray, ...], run: Callable[[Case], np.ndarray]) -> float:
    """The error of a network of full size; one framework's weights are let go before the other's are made."""
    torch.set_num_threads(os.cpu_count() or 1)
    expected = run(Case("", module, inputs, partial(random_params, module, *inputs)))
    torch.set_num_threads(1)
    gc.collect()
    params = jax.tree.map(jnp.asarray, random_params(module, *inputs))
    apply, kernels = jax.jit(module.apply), jax.jit(partial(winograd.transformed, module))(params, *inputs)
    forms: list[dict[str, Any]] = [{}, {winograd.COLLECTION: kernels}] if kernels else [{}]
    return max(relative_error(np.asarray(apply({"params": params} | form, *inputs)), expected) for form in forms)


@pytest.mark.full_size
def test_full_size_unet(measured: Measured) -> None:
    generator = np.random.default_rng(0)
    inputs = (
        generator.standard_normal((1, 64, 64, 4), np.float32),
        np.array([601.0], np.float32),
        generator.standard_normal((1, 77, 768), np.float32),
    )
    error = _full_size(UNet(UNetConfig(cross_attention_dim=768)), inputs, oracle.run_unet)
    assert measured("SD 1.5 UNet at 64 x 64", error) <= 1e-4


@pytest.mark.full_size
def test_full_size_vision_tower(measured: Measured) -> None:
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    pixels = np.random.default_rng(0).standard_normal((1, 224, 224, 3), np.float32)
    assert measured("ViT-L/14 vision tower", _full_size(CLIPVisionModel(config), (pixels,), oracle.run_vision)) <= 1e-4


@pytest.mark.full_size
def test_full_size_text_tower(measured: Measured) -> None:
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    tokens = np.random.default_rng(0).integers(0, 49408, (2, 77), np.int32)
    assert measured("ViT-L/14 text tower", _full_size(CLIPTextModel(config), (tokens,), oracle.run_text)) <= 1e-4
