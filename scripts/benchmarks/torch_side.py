"""PyTorch's diffusers and transformers, timed. `python -m benchmarks.torch_side [--compile=MODE]`.

Channels last, diffusers' default attention (PyTorch's own fused one), inference mode, the same random weights.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before diffusers, which would warn of its own old parts.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.sizes import sd15
from benchmarks.work import GUIDANCE, Ready, Work, process_peak, serve, tuning_batch
from sdipc_jax import tuning
from sdipc_jax.checkpoints.bundle import Params
from sdipc_jax.checkpoints.load import load_weights, read_config
from tests.parity.oracle import options, with_weights
from tests.parity.tuning_oracle import Twin
from tests.random_weights import random_tree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TorchSide:
    """Args: mode: of `torch.compile`; None runs modules as they are."""

    def __init__(self, mode: str | None) -> None:
        # The oracle of the tests has set one.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._compile: Callable[[Any], Any] = (
            (lambda module: module) if mode is None else partial(torch.compile, mode=mode)
        )
        # At its best also with one product for queries, keys and values.
        self._fuses = mode not in (None, "default")

    def make(self, work: Work) -> tuple[Ready, Callable[[], Any]]:
        run = self._program(work)
        mode = torch.enable_grad if work.part == "tune" else torch.inference_mode

        def timed() -> None:
            with mode():
                run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        started = time.perf_counter()
        timed()
        versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        return Ready(0.0, 0.0, time.perf_counter() - started, versions), timed

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else process_peak()

    def _program(self, work: Work) -> Callable[[], Any]:
        self._dtype = getattr(torch, work.dtype)
        if work.part == "tune":
            return self._tuning(work.batch)
        config = read_config("embedded") if work.model == "embedded" else sd15("float32")
        params = load_weights(config).params if work.model == "embedded" else None

        def part(name: str) -> Params:
            return params[name] if params else random_tree(config.abstract_params()[name], seed=0)

        if work.part == "encode":
            return self._encoding(config, part("clip"), work.batch)
        shape = (work.batch, config.tokens.length, config.unet.cross_attention_dim)
        context = self._place(torch.tensor(np.random.default_rng(1).standard_normal(shape, np.float32)))
        contexts = torch.cat([(context[:1] * 0.5).expand_as(context), context])
        latent = config.latent_shape(config.defaults.height, config.defaults.width)
        noise = torch.randn(work.batch, *latent, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        if work.part != "decode":
            module = self._module(UNet2DConditionModel(**options(config.unet)), part("unet"))
            if self._fuses:
                module.fuse_qkv_projections()
            unet = self._compile(module)
        if work.part != "unet":
            vae = self._module(AutoencoderKL(**options(config.vae)), part("vae"))
            vae.decoder = self._compile(vae.decoder)

        def step(scheduler: Any, sample: Any, timestep: Any) -> Any:
            inputs = torch.cat([sample, sample]).to(self._dtype).contiguous(memory_format=torch.channels_last)
            unconditional, conditional = unet(inputs, timestep, contexts).sample.float().chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            return scheduler.step(guided, timestep, sample).prev_sample

        def decode(sample: Any) -> Any:
            latents = (sample / config.vae.scaling_factor).to(self._dtype)
            pictures = vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample.float()
            return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        scheduler.set_timesteps(work.steps or 50)

        def picture() -> Any:
            sample = noise
            for timestep in scheduler.timesteps:
                sample = step(scheduler, sample, timestep)
            return decode(sample)

        def row() -> Any:
            sample = noise
            for timestep in scheduler.timesteps[: work.row]:
                sample = step(scheduler, sample, timestep)
            return sample

        if work.part == "unet":
            return row
        return partial(decode, noise) if work.part == "decode" else picture

    def _encoding(self, config: Any, params: Params, batch: int) -> Callable[[], Any]:
        tower = {name: leaf for name, leaf in params.items() if name not in ("text_projection", "logit_scale")}
        projections = [
            tower.pop("visual_projection")["kernel"],
            np.linalg.pinv(np.asarray(params["text_projection"]["kernel"])),
        ]
        joint, text = (self._place(torch.tensor(np.array(kernel))) for kernel in projections)
        vision = self._compile(self._module(CLIPVisionModel(CLIPVisionConfig(**options(config.clip.vision))), tower))
        side = config.clip.vision.image_size
        pixels = np.random.default_rng(0).standard_normal((batch, side, side, 3), np.float32)
        inputs = self._place(torch.tensor(pixels)).permute(0, 3, 1, 2)
        return lambda: vision(inputs).pooler_output @ joint @ text

    def _tuning(self, batch: int) -> Callable[[], Any]:
        """The plain loop's step, with random numbers that are there already."""
        bundle, settings = load_weights(read_config("embedded")), tuning.TuningSettings(mode="ct")
        arrays, state = tuning_batch(bundle.config, batch), tuning.init(bundle, settings)
        draws = tuning.draw(jax.random.key(0), jnp.arange(batch), state.frozen, settings, arrays)
        twin = Twin(Path(bundle.config.folder), state)
        twin.unet = self._compile(twin.unet.to(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW(twin.trained.values(), lr=5e-6, weight_decay=1e-2)

        def step() -> None:
            optimizer.zero_grad()
            twin.loss(arrays, draws).backward()
            torch.nn.utils.clip_grad_norm_(twin.trained.values(), 1.0)
            optimizer.step()

        return step

    def _module(self, module: Any, params: Params) -> Any:
        return with_weights(module, params).to(DEVICE, self._dtype, memory_format=torch.channels_last)

    def _place(self, tensor: Any) -> Any:
        return tensor.to(DEVICE, self._dtype)


if __name__ == "__main__":
    # The weights are made with JAX on the CPU; the device is PyTorch's.
    jax.config.update("jax_platforms", "cpu")
    serve(TorchSide(next((each.partition("=")[2] for each in sys.argv if each.startswith("--compile=")), None)))
