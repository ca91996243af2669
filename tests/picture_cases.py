"""Whole pictures of the checkpoint in miniature: what JAX, PyTorch and the golden file all make."""

from pathlib import Path

import numpy as np
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin

STEPS, GUIDANCE, NEGATIVE, SCALE, SEED = 20, 7.5, "blue", 27.5, 5
SAMPLERS = ("ddim", "pndm", "euler", "euler-a", "dpm++2m")
SIZES = [(32, 32), (24, 40)]
# What the golden file holds.
GOLDEN = {"ddim": (24, 40), "pndm": (32, 32), "euler": (32, 32), "euler-a": (24, 40), "dpm++2m": (24, 40)}


def write_picture(path: Path) -> Path:
    """A picture to vary: coloured clouds."""
    pixels = np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).resize((70, 90)).save(path)
    return path


def latents_of(height: int, width: int) -> np.ndarray:
    """The noise to start from, (1, 4, h, w); f is 4."""
    return np.random.default_rng(1).standard_normal((1, 4, height // 4, width // 4), np.float32)


def variation(
    bundle: sdipc.Bundle, picture: Path, sampler: str, size: tuple[int, int], scale: float = SCALE, dropped: int = 0
) -> np.ndarray:
    """A variation of a picture in [0, 1], (1, H, W, 3), without the last `dropped` evaluations of the UNet."""
    height, width = size
    features = sdipc.encode_images(bundle, sdipc.read_pictures(bundle, [picture]))
    vectors = sdipc.convert(sdipc.closed_form(bundle, scale=scale), features)
    request, state = begin(
        bundle,
        sdipc.image_prompt(bundle, vectors),
        negative=sdipc.text_prompt(bundle, sdipc.tokenize(bundle, [NEGATIVE])),
        seeds=SEED,
        latents=latents_of(height, width),
        steps=STEPS,
        guidance_scale=GUIDANCE,
        sampler=sampler,
        height=height,
        width=width,
    )
    state = advance(bundle, request, state, 0, request.evaluations - dropped)
    return np.asarray(finish(bundle, state)[0])


def differences(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Mean and largest difference of two pictures in [0, 1], in 8-bit levels."""
    apart = np.abs(np.round(255.0 * found) - np.round(255.0 * expected))
    return float(apart.mean()), float(apart.max())


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two pictures differ by no more than rounding: 0.01 levels in the mean, 1 at most.

    A relative error of 1e-5 in the UNet moves them by 0.0003 levels in the mean.
    """
    mean, largest = differences(found, expected)
    return mean <= 0.01 and largest <= 1
