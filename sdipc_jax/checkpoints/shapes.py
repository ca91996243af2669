"""A single file's configurations: what its shapes say, and its family where they say nothing.

They are the JSON objects that a pipeline's folder has, so that one reader checks both.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdipc_jax.checkpoints.families import INPUTS, REFINER_WIDTH, SD1, SD2, UNCLIP_CLASSES, Family, family_for
from sdipc_jax.checkpoints.single import SingleFile
from sdipc_jax.errors import InputError
from sdipc_jax.files import read_yaml

_HEAD = 64
_MEAN_SPREAD = 0.09
# Of the vision towers that Stable Diffusion was trained with, by width: heads, which no shape tells, and activation.
_TOWERS = {1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
_NAMES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "clip": "CLIP with a vision tower",
}
_OPTIONS = {
    "vae": "--vae FOLDER_ID_OR_FILE",
    "text_encoder": "--text-encoder FOLDER_ID_OR_FILE",
    "text_encoder_2": "--text-encoder FOLDER_ID_OR_FILE with both text encoders",
}
PREDICTIONS = ("epsilon", "v_prediction")
_SPELLINGS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "velocity": "v_prediction",
}


@dataclass(frozen=True)
class Choice:
    """A value, and what said so."""

    value: str
    source: str


def family_of(single: SingleFile) -> Family:
    """The family of the UNet in a file, from its shapes.

    Raises:
        InputError: it has no UNet, or one of another kind.
    """
    require(single, "unet")
    inputs, outputs = single.side("unet", "conv_in.weight", 1), single.side("unet", "conv_out.weight", 0)
    where = f"{single.name}: found"
    advice = "expected a checkpoint of Stable Diffusion 1.x, 2.x or XL: use another file"
    if inputs in INPUTS and inputs != outputs:
        raise InputError(f"{where} {INPUTS[inputs]} (its UNet takes {inputs} channels), {advice}")
    classes = single.shape("unet", "add_embedding.linear_1.weight")
    width = _attention(single, "attn2.to_k.weight", 1)
    if classes is not None and classes[-1:] and classes[-1] in UNCLIP_CLASSES and width == SD2.width:
        raise InputError(f"{where} an unCLIP checkpoint (its label_emb is {classes[-1]} wide), {advice}")
    if width == REFINER_WIDTH:
        raise InputError(f"{where} the refiner of Stable Diffusion XL (its UNet reads {width}-wide prompts), {advice}")
    flat = len(_shape(single, _first_attention(single, "proj_in.weight"))) == 2
    family = family_for(width, linear=flat, added=classes is not None)
    named = single.metadata.get("modelspec.architecture", "")
    if named and not named.startswith(family.architecture):
        raise InputError(
            f"{where} {family.title} by its shapes and {named!r} in its metadata (modelspec.architecture), "
            "expected one of them: use a file that agrees with itself"
        )
    return family


def prediction_of(single: SingleFile, family: Family, asked: str | None = None) -> Choice:
    """What the UNet predicts: as asked for, or as the first says that says anything."""
    metadata, sidecar = single.metadata, single.file.with_suffix(".yaml")
    named = metadata.get("modelspec.prediction_type", "").lower()
    if asked is not None:
        return Choice(asked, "--prediction-type")
    if sidecar.is_file() and (found := _from_sidecar(sidecar)) is not None:
        return Choice(found, sidecar.name)
    if single.v_prediction:
        return Choice("v_prediction", "its tensor v_pred")
    if named in _SPELLINGS:
        return Choice(_SPELLINGS[named], "its metadata (modelspec.prediction_type)")
    if metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        return Choice("v_prediction", "its metadata (modelspec.architecture)")
    if family is SD2:
        return _from_norms(single)
    return Choice("epsilon", "its family")


def _from_sidecar(path: Path) -> str | None:
    """What CompVis' or SGM's configuration beside the file says."""
    values: Any = read_yaml(path, "the configuration of the file beside it", "a mapping")
    for key in ("model", "params"):
        values = values.get(key) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        return None
    if "parameterization" in values:
        return _SPELLINGS.get(str(values["parameterization"]).lower())
    for key in ("denoiser_config", "params", "scaling_config", "target"):
        values = values.get(key) if isinstance(values, dict) else None
    ends = {"VScaling": "v_prediction", "EpsScaling": "epsilon"}
    return next((value for end, value in ends.items() if isinstance(values, str) and values.endswith(end)), None)


def _from_norms(single: SingleFile) -> Choice:
    """Stable Diffusion 2.x alone: the biases of a late norm spread far wider in models that predict v."""
    name = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    shape = single.shape("unet", name)
    if shape is None:
        return Choice("epsilon", "its family")
    spread = float(np.std(single.read("unet", {name: shape})[name].read().astype(np.float64)))
    value = "v_prediction" if spread > _MEAN_SPREAD else "epsilon"
    return Choice(value, f"the spread of a norm's biases, {spread:.3f}")


def require(single: SingleFile, part: str) -> None:
    """Refuses a file that lacks a part, and says how to give it."""
    if part not in single:
        held = " and ".join(_NAMES[name] for name in _NAMES if name in single)
        option = _OPTIONS.get(part)
        advice = f"pass {option}" if option else "use a whole checkpoint"
        raise InputError(f"{single.name}: found no {_NAMES[part]}, only the {held}, expected one: {advice}")


def configuration(
    single: SingleFile, part: str, prediction: str = "epsilon", beside: Family | None = None
) -> dict[str, Any]:
    """The config.json of a part that is in a single file.

    Args:
        prediction: what the UNet predicts, on which the size of its pictures depends.
        beside: the family of the UNet that the part goes with, where the file has none.

    Raises:
        InputError: the part is not there, or its shapes are no network's.
    """
    require(single, part)
    if part == "clip":
        return _clip(single)
    if part == "unet":
        return _unet(single, family_of(single), prediction)
    # A VAE or a text tower alone does not tell its family.
    family = family_of(single) if "unet" in single else beside or SD1
    return _vae(single, family) if part == "vae" else _text(single, part, family)


def _unet(single: SingleFile, family: Family, prediction: str) -> dict[str, Any]:
    side = functools.partial(single.side, "unet")
    levels = single.count("unet", "down_blocks.{}.resnets.0.conv1.weight")
    channels = [side(f"down_blocks.{b}.resnets.0.conv1.weight", 0) for b in range(levels)]
    depths = _depths(single, levels)
    up = single.unet_attention
    values = {
        "sample_size": family.sizes[prediction],
        "in_channels": side("conv_in.weight", 1),
        "out_channels": side("conv_out.weight", 0),
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in depths.down],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up],
        "layers_per_block": single.unet_layers,
        "cross_attention_dim": _attention(single, "attn2.to_k.weight", 1),
        "attention_head_dim": [family.heads or max(1, width // _HEAD) for width in channels],
        "use_linear_projection": len(_shape(single, _first_attention(single, "proj_in.weight"))) == 2,
    }
    values |= depths.settings
    if single.shape("unet", "time_embedding.cond_proj.weight") is not None:
        values["time_cond_proj_dim"] = side("time_embedding.cond_proj.weight", 1)
    if single.shape("unet", "add_embedding.linear_1.weight") is not None:
        values["projection_class_embeddings_input_dim"] = side("add_embedding.linear_1.weight", 1)
        values |= family.unet
    return values


@dataclass(frozen=True)
class _Depths:
    """How many transformer blocks stand after each residual block of a UNet, 0 where there is no transformer.

    Attributes:
        down, up: by level in the order in which they run, and by layer.
        middle: None where there is no middle.
    """

    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    middle: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says of them, where they are not 1 everywhere."""
        down, up = ([_one_or_all(level) or 1 for level in levels] for levels in (self.down, self.up))
        if not any(self.down[-1]):
            # Nothing but the middle reads that number.
            down[-1] = self.middle or 1
        values: dict[str, Any] = {}
        if any(depth != 1 for depth in down):
            values["transformer_layers_per_block"] = down
        mirrored = all(
            not any(level) or _one_or_all(level) == other for level, other in zip(self.up, down[::-1], strict=True)
        )
        if not mirrored or any(isinstance(depth, list) for depth in down):
            values["reverse_transformer_layers_per_block"] = up
        if not self.middle:
            values["mid_block_type"] = None if self.middle is None else "UNetMidBlock2D"
        return values


def _one_or_all(depths: tuple[int, ...]) -> int | list[int]:
    return depths[0] if len(set(depths)) == 1 else list(depths)


def _depths(single: SingleFile, levels: int) -> _Depths:
    """Counts them, also where some were taken away, as in SSD-1B, Segmind Vega and KOALA.

    Raises:
        InputError: no configuration can say it.
    """
    down, up = (
        tuple(
            tuple(_depth(single, f"{side}_blocks.{b}.attentions.{i}") for i in range(single.unet_layers + more))
            for b in range(levels)
        )
        for side, more in (("down", 0), ("up", 1))
    )
    has_middle, whole = (single.shape("unet", f"mid_block.resnets.{i}.conv1.weight") is not None for i in range(2))
    middle = _depth(single, "mid_block.attentions.0") if has_middle else None
    holes = [level for level in (*down, *up) if any(level) and not all(level)]
    if holes or bool(middle) != whole or (middle and any(down[-1]) and middle != down[-1][0]):
        raise InputError(
            f"{single.name}: found a UNet of which single blocks were taken away (transformer blocks on the way down "
            f"{down}, in the middle {middle}, on the way up {up}), expected levels with or without transformers and a "
            "middle as deep as the last: use the checkpoint that it was made from"
        )
    return _Depths(down, up, middle)


def _depth(single: SingleFile, module: str) -> int:
    """Transformer blocks of a UNet's module, 0 if it is not there."""
    return single.count("unet", f"{module}.transformer_blocks.{{}}.norm1.weight")


def _first_attention(single: SingleFile, rest: str) -> str:
    for b in range(single.count("unet", "down_blocks.{}.resnets.0.conv1.weight")):
        name = f"down_blocks.{b}.attentions.0.{rest}"
        if single.shape("unet", name) is not None:
            return name
    return f"mid_block.attentions.0.{rest}"


def _attention(single: SingleFile, rest: str, axis: int) -> int:
    return single.side("unet", _first_attention(single, f"transformer_blocks.0.{rest}"), axis)


def _shape(single: SingleFile, name: str) -> tuple[int, ...]:
    single.side("unet", name, 0)
    return single.shape("unet", name) or ()


def _vae(single: SingleFile, family: Family) -> dict[str, Any]:
    side = functools.partial(single.side, "vae")
    levels = single.count("vae", "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return {
        "block_out_channels": [side(f"encoder.down_blocks.{b}.resnets.0.conv1.weight", 0) for b in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": single.count("vae", "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "latent_channels": side("decoder.conv_in.weight", 1),
        "scaling_factor": family.scaling_factor,
    } | dict(family.vae)


def _text(single: SingleFile, part: str, family: Family) -> dict[str, Any]:
    side = functools.partial(single.side, part)
    open_clip = single.places[part].naming == "open_clip"
    width = side("text_model.final_layer_norm.weight", 0)
    layers = single.count(part, "text_model.encoder.layers.{}.layer_norm1.weight")
    # ViT-H's last block is kept for nothing in Stable Diffusion 2.x.
    last = SD2.text_layers if open_clip and part == "text_encoder" else layers
    projection = single.shape(part, "text_projection.weight")
    return {
        "model_type": "clip_text_model",
        "vocab_size": side("text_model.embeddings.token_embedding.weight", 0),
        "hidden_size": width,
        "intermediate_size": side("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": min(layers, last),
        "num_attention_heads": max(1, width // _HEAD),
        "max_position_embeddings": side("text_model.embeddings.position_embedding.weight", 0),
        "hidden_act": "gelu" if open_clip or family is SD2 or part == "text_encoder_2" else "quick_gelu",
        "projection_dim": width if not projection else projection[-1 if open_clip else 0],
        "architectures": ["CLIPTextModel" if part == "text_encoder" else "CLIPTextModelWithProjection"],
    }


def _clip(single: SingleFile) -> dict[str, Any]:
    """Of a whole CLIP under transformers' names."""
    side = functools.partial(single.side, "clip")
    width = side("vision_model.embeddings.class_embedding", 0)
    if width not in _TOWERS:
        known = ", ".join(map(str, _TOWERS))
        raise InputError(f"{single.name}: the vision tower is {width} wide, expected {known}: give the CLIP's folder")
    heads, activation = _TOWERS[width]
    patch = side("vision_model.embeddings.patch_embedding.weight", 3)
    text = side("text_projection.weight", 1)
    return {
        "projection_dim": side("visual_projection.weight", 0),
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": side("vision_model.encoder.layers.0.mlp.fc1.weight", 0),
            "num_hidden_layers": single.count("clip", "vision_model.encoder.layers.{}.layer_norm1.weight"),
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": patch * math.isqrt(max(0, side("vision_model.embeddings.position_embedding.weight", 0) - 1)),
            "hidden_act": activation,
        },
        "text_config": {
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_attention_heads": max(1, text // _HEAD),
            "num_hidden_layers": single.count("clip", "text_model.encoder.layers.{}.layer_norm1.weight"),
            "hidden_act": activation,
        },
    }
