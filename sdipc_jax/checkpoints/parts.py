"""A part's configuration, from its folder or from the shapes of a single file, and its class, which must be known."""

import json
from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints.families import Family
from sdipc_jax.checkpoints.headers import check_pointer
from sdipc_jax.checkpoints.shapes import configuration
from sdipc_jax.checkpoints.single import open_single
from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.preprocessing import PROCESSORS

# What model_index.json and the parts' own configurations may name.
CLASSES: dict[str, set[str]] = {
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL"},
    "text_encoder": {"CLIPTextModel"},
    "text_encoder_2": {"CLIPTextModelWithProjection"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "tokenizer_2": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "safety_checker": {"StableDiffusionSafetyChecker"},
    "feature_extractor": set(PROCESSORS),
    "image_encoder": set(),
    "clip": {"CLIPModel"},
}
_MODEL_TYPES = {
    "text_encoder": "clip_text_model",
    "text_encoder_2": "clip_text_model",
    "clip": "clip",
    "safety_checker": "clip",
}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    shown = printable(path)
    check_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{shown}: not found, expected a whole checkpoint folder: fetch it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{shown}: not readable ({error}), expected a JSON object: fetch it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{shown}: holds {type(values).__name__}, expected a JSON object: fetch it again")
    return values


def read_part(place: Path, component: str, prediction: str = "epsilon", family: Family | None = None) -> dict[str, Any]:
    """A part's config.json, or what a single file's shapes say; its class must be the one that is built.

    Args:
        prediction, family: of the UNet beside it, which a file without one does not tell.
    """
    values = (
        configuration(open_single(place), component, prediction, family)
        if place.is_file()
        else read_json(place, "config.json")
    )
    for key in ("_class_name", "architectures"):
        found = values.get(key) or []
        for each in found if isinstance(found, list) else [found]:
            if str(each) not in CLASSES[component]:
                raise InputError(
                    f"{component}/config.json: {key} is {each!r}, expected {min(CLASSES[component])!r}: "
                    "use a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
                )
    kind = values.get("model_type")
    if kind not in (None, _MODEL_TYPES.get(component)):
        raise InputError(
            f"{component}/config.json: model_type is {kind!r}, expected {_MODEL_TYPES.get(component)!r}: "
            "use a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
        )
    return values
