"""The guidance scale that full LCMs are told, against diffusers' pipeline and UNet."""

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import LatentConsistencyModelPipeline

from sdipc_jax.models import UNet2DConditionModel, UNetConfig
from tests.cases import Case
from tests.compare import relative_error
from tests.parity.oracle import nchw, nhwc, unet
from tests.random_weights import random_params


def test_the_unet_is_told_the_guidance_scale() -> None:
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=24,
        layers_per_block=1,
        time_cond_proj_dim=15,
    )
    generator = np.random.default_rng(0)
    sample = generator.standard_normal((3, 8, 8, 4), np.float32)
    inputs = sample, np.float32([999, 259, 19]), generator.standard_normal((3, 5, 24), np.float32)
    scales = np.float32([8.5, 1.0, 0.25])
    module = UNet2DConditionModel(config)
    case = Case("lcm", module, inputs, partial(random_params, module, *inputs, seed=0), {"guidance_scale": scales})
    embedding: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    told = embedding(None, torch.tensor(scales - 1), embedding_dim=15)
    found = case.run()
    with torch.no_grad():
        expected = nhwc(
            unet(case)(nchw(sample), torch.tensor(inputs[1]), torch.tensor(inputs[2]), timestep_cond=told).sample
        )
    assert relative_error(found, expected) <= 1e-5
    other = Case("lcm", module, inputs, case.weights)
    assert relative_error(other.run()[1:2], expected[1:2]) <= 1e-5
    assert relative_error(other.run()[:1], expected[:1]) > 1e-3
