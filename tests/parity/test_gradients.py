"""Gradients of a picture's loss with respect to its prompt, against PyTorch's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DDIMScheduler

import sdipc_jax as sdipc
from tests import start_cases
from tests.parity.picture_oracle import open_pipeline
from tests.parity.sampler_oracle import quiet

STEPS, GUIDANCE = 3, 3.0


@torch.enable_grad()
def by_pytorch(folder: Path, context: np.ndarray, negative: np.ndarray, target: np.ndarray) -> np.ndarray:
    with quiet():
        pipeline = open_pipeline(folder)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    prompt = torch.tensor(context, requires_grad=True)
    latents = torch.tensor(start_cases.noise()) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        both = torch.cat([torch.tensor(negative), prompt])
        unconditional, conditional = pipeline.unet(torch.cat([latents] * 2), timestep, both).sample.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    picture = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    loss = ((picture.clamp(0, 1) - torch.tensor(target)) ** 2).mean()
    (gradient,) = torch.autograd.grad(loss, prompt)
    return gradient.numpy()


def test_gradient_of_a_prompt(tiny_folder: Path, tiny: sdipc.Bundle) -> None:
    context = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, [start_cases.TEXT]))
    negative = sdipc.negative_prompt(tiny)
    target = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)

    @jax.jit
    def loss(bundle: sdipc.Bundle, context: jax.Array) -> jax.Array:
        picture = sdipc.generate(
            bundle,
            context,
            latents=jnp.asarray(start_cases.noise()),
            steps=STEPS,
            guidance_scale=GUIDANCE,
            sampler="ddim",
            differentiable=True,
        )
        return jnp.mean(jnp.square(picture - target))

    found = np.asarray(jax.grad(loss, argnums=1)(tiny, context))
    expected = by_pytorch(tiny_folder, np.asarray(context), np.asarray(negative), target.transpose(0, 3, 1, 2))
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
