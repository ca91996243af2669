"""What looks at pictures: the CLIP's vision side, and the safety checker."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints.bundle import SafetySide, VisionSide
from sdipc_jax.checkpoints.checks import check_counts
from sdipc_jax.checkpoints.headers import read_header, read_metadata
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE, OVERWRITE
from sdipc_jax.checkpoints.parts import read_json, read_part
from sdipc_jax.errors import InputError, printable
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig
from sdipc_jax.models.deep_prompts import DeepPrompts
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.settings import SafetyName


def read_clip(folder: Path, clip: str | Path | None) -> VisionSide | None:
    clip_folder = folder / "clip" if clip is None else Path(clip)
    if clip is None and not clip_folder.is_dir():
        return None
    values = read_part(clip_folder, "clip")
    source = f"{clip_folder.name}/config.json"
    if "vision_config" not in values or "text_config" not in values:
        raise InputError(
            f"{source}: no vision_config and text_config, expected a whole CLIPModel: "
            "pass --clip with the CLIP this checkpoint was trained with"
        )
    vision = _clip_part(CLIPVisionConfig, values, "vision_config", source)
    clip_text = _clip_part(CLIPTextConfig, values, "text_config", source)
    check_counts(f"{source}: vision_config", vision)
    check_counts(f"{source}: text_config", clip_text)
    if clip_folder.is_file():
        preprocessing = Preprocessing(size=vision.image_size, crop_size=(vision.image_size, vision.image_size))
    else:
        preprocessing = Preprocessing.from_json(
            read_json(clip_folder, "preprocessor_config.json"), f"{clip_folder.name}/preprocessor_config.json"
        )
    _check_size(preprocessing, vision, clip_folder.name)
    return VisionSide(
        str(clip_folder),
        vision,
        preprocessing,
        _projection_dim(values, source),
        clip_text,
        prompts=_read_prompts(clip_folder / DEEP_PROMPTS_FILE),
        trained_inverse=(clip_folder / INVERSE_FILE).is_file(),
    )


def _read_prompts(file: Path) -> DeepPrompts | None:
    if not file.is_file():
        return None
    shapes = {tensor.name: tensor.shape for tensor in read_header(file)}
    shape = shapes.get("deep_prompts.embeddings", ())
    if len(shape) != 3:
        raise InputError(f"{file}: no deep_prompts.embeddings of three axes, expected the file of a tuned checkpoint")
    return DeepPrompts(shape[1], read_metadata(file).get(OVERWRITE) == "true")


def read_safety(folder: Path, safety: SafetyName) -> SafetySide | None:
    if not (folder / "safety_checker").is_dir():
        if safety == "on":
            raise InputError(
                f"{printable(folder)}: no safety_checker/ folder, expected one with --safety on: fetch the whole "
                "checkpoint, or leave the option out"
            )
        return None
    source = "safety_checker/config.json"
    values = read_part(folder / "safety_checker", "safety_checker")
    vision = _clip_part(CLIPVisionConfig, values, "vision_config", source)
    check_counts(f"{source}: vision_config", vision)
    vision = dataclasses.replace(vision, projection_dim=_projection_dim(values, source))
    preprocessing = Preprocessing.from_json(
        read_json(folder, "feature_extractor/preprocessor_config.json"), "feature_extractor/preprocessor_config.json"
    )
    _check_size(preprocessing, vision, "feature_extractor")
    return SafetySide(vision, preprocessing)


def _check_size(preprocessing: Preprocessing, vision: CLIPVisionConfig, source: str) -> None:
    if preprocessing.output_size != (vision.image_size, vision.image_size):
        height, width = preprocessing.output_size
        raise InputError(
            f"{source}/preprocessor_config.json: gives {height}x{width} pictures but the vision tower takes "
            f"{vision.image_size}x{vision.image_size}: use the files of one CLIP together"
        )


def _projection_dim(values: Mapping[str, Any], source: str) -> int:
    joint = values.get("projection_dim", 512)
    if type(joint) is not int or not 1 <= joint <= 100_000:
        raise InputError(f"{source}: projection_dim is {joint!r}, expected 1 to 100,000: correct it")
    return joint


def _clip_part(kind: Any, values: Mapping[str, Any], name: str, source: str) -> Any:
    merged: dict[str, Any] = {}
    # transformers lets the old `*_config_dict` win where both are there.
    for key in (name, f"{name}_dict"):
        part = values.get(key) or {}
        if not isinstance(part, Mapping):
            raise InputError(f"{source}: {key} is {part!r}, expected a JSON object: fetch it again")
        merged |= part
    return kind.from_json(merged, f"{source}: {name}")
