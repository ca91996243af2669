"""The networks against PyTorch, live: more seeds than the golden files hold, full sizes, bfloat16."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet

from sdipc_jax.models import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, UNetConfig
from sdipc_jax.models import UNet2DConditionModel as UNet
from tests import cases
from tests.cases import Case
from tests.compare import relative_error
from tests.parity import oracle
from tests.random_weights import random_params

GROUPS = {
    "block": (cases.block_cases, oracle.run_block),
    "unet": (cases.unet_cases, oracle.run_unet),
    "text": (cases.text_cases, oracle.run_text),
    "vision": (cases.vision_cases, oracle.run_vision),
}


def _reseeded(case: Case, seed: int) -> Case:
    """The same network with other weights and inputs."""
    generator = np.random.default_rng(seed)

    def redraw(x: np.ndarray) -> np.ndarray:
        return (
            x
            if x.ndim < 2 or x.dtype == np.int32
            else np.float32(x.std()) * generator.standard_normal(x.shape, np.float32)
        )

    inputs = tuple(redraw(x) for x in case.inputs)
    return dataclasses.replace(case, inputs=inputs, params=random_params(case.module, *inputs, seed=seed))


@pytest.mark.parametrize("group", GROUPS)
def test_networks_equal_pytorch(group: str) -> None:
    make, run = GROUPS[group]
    for seed, case in enumerate(make()):
        case = _reseeded(case, 100 + seed)
        assert relative_error(case.run(), run(case)) <= 1e-5, case.name


def test_vae_equals_pytorch() -> None:
    for seed, case in enumerate(cases.vae_cases()):
        case = _reseeded(case, 200 + seed)
        mean, log_variance, pictures = oracle.run_vae(case)

        def both(variables: dict[str, Any], x: jax.Array, module: Any = case.module) -> tuple[jax.Array, ...]:
            found, logs = module.apply(variables, x, method="encode")
            return found, logs, module.apply(variables, found, method="decode")

        for found, expected in zip(case.run(both), (mean, log_variance, pictures), strict=True):
            assert relative_error(found, expected) <= 1e-5, case.name


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases.unet_cases()[:3]])
def test_bfloat16_is_as_near_to_float64_as_pytorch_is(case: Case) -> None:
    sample, timesteps, context = case.inputs
    module = oracle.unet(case)

    def run(dtype: torch.dtype) -> np.ndarray:
        inputs = oracle.nchw(sample).to(dtype), torch.tensor(timesteps), torch.tensor(context).to(dtype)
        output = module.to(dtype)(*inputs).sample
        return output.double().numpy().transpose(0, 2, 3, 1)

    exact = run(torch.float64)
    torch_error = relative_error(run(torch.bfloat16), exact)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), case.params)
    found = jax.jit(case.module.clone(dtype=jnp.bfloat16).apply)({"params": params}, *case.inputs)
    assert relative_error(np.asarray(found, np.float64), exact) <= 1.25 * torch_error


def test_full_size_unet() -> None:
    config = UNetConfig(cross_attention_dim=768)
    generator = np.random.default_rng(0)
    inputs = (
        generator.standard_normal((1, 64, 64, 4), np.float32),
        np.array([601.0], np.float32),
        generator.standard_normal((1, 77, 768), np.float32),
    )
    case = Case("sd1.5", UNet(config), inputs, random_params(UNet(config), *inputs))
    found = case.run()
    with torch.device("meta"):
        module = TorchUNet(**oracle.options(config))
    module.load_state_dict(oracle.state_dict(case.params), assign=True)
    sample, timesteps, context = inputs
    expected = module.eval()(oracle.nchw(sample), torch.tensor(timesteps), torch.tensor(context)).sample
    assert relative_error(found, oracle.nhwc(expected)) <= 1e-4


def test_full_size_clip() -> None:
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((1, 224, 224, 3), np.float32)
    tokens = generator.integers(0, 49408, (2, 77), np.int32)
    for module, inputs, run in (
        (CLIPVisionModel(vision), pixels, oracle.run_vision),
        (CLIPTextModel(text), tokens, oracle.run_text),
    ):
        case = Case("ViT-L/14", module, (inputs,), random_params(module, inputs))
        assert relative_error(case.run(), run(case)) <= 1e-4
