"""Pictures that sampling starts from, for the comparison with PyTorch."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import sdipc_jax as sdipc
from sdipc_jax.sampling import start_from
from tests.tiny import write_checkpoint

STEPS, GUIDANCE, TEXT = 10, 4.0, "a red cat"
STRENGTHS = (0.3, 0.6, 1.0)
SAMPLERS = ("ddim", "pndm", "euler", "euler-a", "dpm++2m")
# Each sampler once, two with every strength.
CASES = [
    *((sampler, strength) for sampler in SAMPLERS[:2] for strength in STRENGTHS),
    *((each, 0.6) for each in SAMPLERS[2:]),
]


def picture() -> np.ndarray:
    """Smooth colours, (32, 32, 3) in 8 bits."""
    rows, columns = np.mgrid[0:32, 0:32] / 31
    return np.round(255 * np.stack([rows, columns, np.sin(6 * rows * columns) ** 2], axis=-1)).astype(np.uint8)


def mask() -> np.ndarray:
    """A disc to repaint, (32, 32), which meets no edge of the latents' pixels."""
    rows, columns = np.mgrid[0:32, 0:32]
    return ((rows - 13) ** 2 + (columns - 17) ** 2 < 81).astype(np.uint8)


def noise() -> np.ndarray:
    """Of unit variance, (1, 4, 8, 8)."""
    return np.random.default_rng(3).standard_normal((1, 4, 8, 8), np.float32)


def write_repainting_checkpoint(folder: Path) -> Path:
    """One whose UNet reads mask and masked latents too."""
    from tests.tiny import SMALL_UNET

    return write_checkpoint(folder, unet=dataclasses.replace(SMALL_UNET, in_channels=9))


def started(bundle: sdipc.Bundle, sampler: str, strength: float, masked: bool) -> np.ndarray:
    """What becomes of the picture, (1, 32, 32, 3)."""
    pictures = jnp.asarray(picture()[None] / 255, jnp.float32)
    start = start_from(bundle, pictures, strength, mask()[None] if masked else None)
    context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, [TEXT]))
    options: dict[str, Any] = {
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "sampler": sampler,
        "latents": jnp.asarray(noise()),
    }
    return np.asarray(sdipc.generate(bundle, context, start=start, seeds=5, **options))
