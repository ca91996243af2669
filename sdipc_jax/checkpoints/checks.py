"""Whether the parts of a checkpoint can be built and fit each other, and which relatives of SDXL are none."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from sdipc_jax.checkpoints.bundle import SIZES
from sdipc_jax.errors import InputError
from sdipc_jax.models import CLIPTextConfig, UNetConfig
from sdipc_jax.models.config import Architecture

_DEEPEST = 200
# What is left of a matrix of rank 1 without its one direction is below this share of it, which rounding makes of 0.
_ROUNDING = 1e-6


def check_counts(source: str, part: Architecture) -> None:
    """Refuses what could not be built, or not in a lifetime: each layer is traced on its own."""
    for name, value in part.to_json().items():
        if name == "transformer_layers_per_block":
            value = max(max(each) if isinstance(each, tuple) else each for each in value)
        if type(value) is int and name != "freq_shift":
            most = _DEEPEST if name.endswith(("num_hidden_layers", "layers_per_block")) else value
            if not 1 <= value <= most:
                raise InputError(f"{source}: {name} is {value}, expected 1 to {max(most, _DEEPEST)}: correct it")


def check_kind(where: str, index: Mapping[str, Any]) -> None:
    """Refuses what model_index.json calls something else.

    Raises:
        InputError: SDXL's refiner, or a checkpoint with EDM's noise levels.
    """
    if index.get("requires_aesthetics_score"):
        raise InputError(
            f"{where}: found SDXL's refiner (requires_aesthetics_score), which goes over another's pictures, expected "
            "the base: use that"
        )
    check_noise_levels(where, str((index.get("scheduler") or [None])[-1]))


def check_noise_levels(where: str, scheduler: str) -> None:
    """Refuses the class of a scheduler whose noise levels are not Stable Diffusion's.

    Raises:
        InputError: they are EDM's.
    """
    if scheduler.startswith("EDM"):
        raise InputError(
            f"{where}: the scheduler is a {scheduler}, with EDM's noise levels as Playground 2.5 and CosXL have, "
            "expected one of Stable Diffusion's: use another checkpoint"
        )


def check_towers(name: str, unet: UNetConfig, text: CLIPTextConfig, text_2: CLIPTextConfig | None) -> None:
    """Refuses towers whose states the UNet does not read, and SDXL's relatives whose UNets are told other things.

    Args:
        name: of the checkpoint, for errors.

    Raises:
        InputError: with what was found and what the UNet expects.
    """
    if unet.addition_time_embed_dim is None:
        if text_2 is not None:
            raise InputError(
                f"{name}: there is a text_encoder_2, but the UNet reads no pooled text (addition_embed_type is null), "
                "expected SDXL's UNet: use the parts of one checkpoint together"
            )
    elif text_2 is None:
        raise InputError(
            f"{name}: the UNet reads a pooled text, but there is no text_encoder_2, expected SDXL's two text "
            "encoders: fetch the whole checkpoint"
        )
    else:
        pooled = (unet.projection_class_embeddings_input_dim or 0) - SIZES * unet.addition_time_embed_dim
        if pooled == text_2.projection_dim - unet.addition_time_embed_dim:
            raise InputError(
                f"{name}: the UNet reads five numbers beside the pooled text, as SDXL's refiner does, expected the "
                "base's six: the refiner is not supported, use the base"
            )
        if pooled != text_2.projection_dim:
            raise InputError(
                f"{name}: the UNet reads {pooled}-wide pooled texts and text_encoder_2 gives {text_2.projection_dim}, "
                "expected as many: use the parts of one checkpoint together"
            )
    width = text.hidden_size + (0 if text_2 is None else text_2.hidden_size)
    if width != unet.cross_attention_dim:
        raise InputError(
            f"{name}: the text encoder's states are {width} wide but the UNet reads "
            f"{unet.cross_attention_dim}-wide prompts: use the parts of one checkpoint together"
        )


def check_projection(projection: Float[np.ndarray, "D_text D_joint"], name: str) -> None:
    """Refuses what some programs write where they have no text projection.

    Raises:
        InputError: it has rank 1, as a constant one has.
    """
    values = np.asarray(projection, np.float64)
    longest = values[np.argmax(np.linalg.norm(values, axis=1))]
    along = np.outer(values @ longest, longest) / max(float(longest @ longest), np.finfo(float).tiny)
    if min(values.shape) > 1 and np.linalg.norm(values - along) <= _ROUNDING * np.linalg.norm(values):
        raise InputError(
            f"{name}: found a dummy text_projection, all of whose rows are alike, expected CLIP's: "
            "use the files of the CLIP itself"
        )
