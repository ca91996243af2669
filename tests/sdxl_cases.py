"""Whole pictures of SDXL, its few-step relatives and SD 2.1 in miniature: what JAX, PyTorch and a golden file make."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import sdipc_jax as sdipc
from sdipc_jax.samplers import SchedulerConfig
from tests.tiny import SDXL_SCHEDULER, quick_unet, tiny_bundle, tiny_sdxl

STEPS, GUIDANCE = 20, 5.0
V_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.39.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@dataclass(frozen=True)
class Pictures:
    """What is asked for, of both sides. The seed of each picture's fresh noise is its place.

    Attributes:
        negative: None where it is left out.
        original, crop, target: SDXL's sizes, (height, width) or (top, left).
        negative_original: of the negative prompt, whose target is the positive's.
    """

    texts: tuple[str, ...]
    size: tuple[int, int]
    sampler: str
    negative: str | None = None
    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    negative_original: tuple[int, int] | None = None
    steps: int = STEPS
    guidance: float = GUIDANCE

    @property
    def latents(self) -> np.ndarray:
        """Noise, (N, 4, h, w)."""
        shape = (len(self.texts), 4, self.size[0] // 4, self.size[1] // 4)
        return np.random.default_rng(len(self.texts)).standard_normal(shape, np.float32)


# Square and not, batches of one and of three, full and cropped; the negative prompt left out, empty, and with sizes of
# its own. "!" is what SDXL's second tokenizer and SD 2's pad with, and a word as well.
PICTURES = {
    "sdxl/square": Pictures(("a red cat", "b", "a text that is long!"), (32, 32), "euler"),
    "sdxl/cropped": Pictures(
        ("a dog",), (24, 40), "euler", negative="", original=(1000, 1536), crop=(64, 0), target=(1024, 1024),
        negative_original=(512, 700),
    ),
    "sd2/square": Pictures(("a red cat", "b"), (32, 32), "ddim", negative="blue!"),
    "sd2/wide": Pictures(("a dog",), (24, 40), "ddim"),
}  # fmt: skip


def _few(texts: tuple[str, ...], steps: int, guidance: float, **more: Any) -> Pictures:
    """By the sampler of the checkpoint's own scheduler."""
    return Pictures(texts, (32, 32), "checkpoint", steps=steps, guidance=guidance, **more)


# Turbo, Lightning of one step and of several, a full LCM, which is told the guidance scale, and base with LCM's LoRA.
FEW_STEPS = {
    "turbo/1": _few(("a red cat", "b"), 1, 0.0),
    "turbo/4": _few(("a red cat", "b"), 4, 0.0),
    "lightning-1/1": _few(("a dog",), 1, 1.0),
    "lightning/2": _few(("a red cat", "b"), 2, 0.0),
    "lightning/4": _few(("a dog",), 4, 1.0, original=(1000, 1536), crop=(64, 0), target=(1024, 1024)),
    "lightning/8": _few(("a dog",), 8, 0.0),
    "lcm/4": _few(("a red cat", "b"), 4, 8.5),
    "lcm-lora/4": _few(("a red cat", "b"), 4, 1.5, negative="blue!"),
}
_TRAILING = SDXL_SCHEDULER | {"timestep_spacing": "trailing"}
SCHEDULERS = {
    "turbo": _TRAILING | {"_class_name": "EulerAncestralDiscreteScheduler"},
    "lightning": _TRAILING,
    "lightning-1": _TRAILING | {"prediction_type": "sample"},
    "lcm": SDXL_SCHEDULER | {"_class_name": "LCMScheduler"},
    "lcm-lora": SDXL_SCHEDULER | {"_class_name": "LCMScheduler"},
}


def write_sdxl(folder: Path, **changes: Any) -> Path:
    """The checkpoint's folder."""
    sdipc.save(tiny_sdxl(folder.with_name(f"{folder.name}-parts"), **changes), folder)
    return folder


def write_sd2(folder: Path) -> Path:
    """A checkpoint that predicts v, has linear projections, the exact GELU and upcast attention, and pads with "!"."""
    parts = folder.with_name(f"{folder.name}-parts")
    first = tiny_bundle(parts / "first").config
    unet = dataclasses.replace(first.unet, use_linear_projection=True, upcast_attention=True)
    text = dataclasses.replace(first.text, hidden_act="gelu")
    scheduler = SchedulerConfig.from_json(V_SCHEDULER)
    sdipc.save(tiny_bundle(parts / "v", pad="!", clip=None, unet=unet, text=text, scheduler=scheduler), folder)
    return folder


def write_few_steps(folder: Path) -> Path:
    """A folder with all of `SCHEDULERS`."""
    unet = quick_unet(tiny_sdxl(folder / "plain").config.unet)
    for name, fields in SCHEDULERS.items():
        told = dataclasses.replace(unet, time_cond_proj_dim=6 if name == "lcm" else None)
        write_sdxl(folder / name, scheduler=SchedulerConfig.from_json(fields), unet=told)
    return folder


@cache
def bundle_of(folder: Path) -> sdipc.Bundle:
    return sdipc.load(folder)


def write_checkpoints(folder: Path) -> Path:
    """A folder with both."""
    write_sdxl(folder / "sdxl")
    write_sd2(folder / "sd2")
    return folder


def make(folder: Path, name: str) -> np.ndarray:
    """The pictures, by this package."""
    asked, bundle = (PICTURES | FEW_STEPS)[name], bundle_of(folder / name.split("/")[0])
    prompt = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, asked.texts))
    tokens = None if asked.negative is None else sdipc.tokenize(bundle, [asked.negative])
    negative = sdipc.negative_prompt(bundle, tokens)
    if asked.original is not None:
        prompt = prompt.with_sizes(asked.original, asked.target, asked.crop)
    if asked.negative_original is not None:
        negative = negative.with_sizes(asked.negative_original, asked.target)
    pictures = sdipc.generate(
        bundle, prompt, negative=negative, seeds=np.arange(len(asked.texts)), latents=asked.latents, steps=asked.steps,
        guidance_scale=asked.guidance, sampler=asked.sampler, height=asked.size[0], width=asked.size[1],
    )  # fmt: skip
    return np.asarray(pictures)
