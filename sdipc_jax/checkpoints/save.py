"""A bundle, into a diffusers folder that PyTorch's diffusers and transformers open."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sdipc_jax.checkpoints.bundle import Bundle, Config, Params, SpecialTokens
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE, OVERWRITE, flatten, to_torch, torch_name
from sdipc_jax.checkpoints.tokenizer import write_tokenizer
from sdipc_jax.errors import InputError
from sdipc_jax.models.config import Architecture, CLIPTextConfig, CLIPVisionConfig

# The oldest diffusers whose files these are; it tells diffusers which defaults of old to apply, here none.
_DIFFUSERS_VERSION = "0.39.0"
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


def save(bundle: Bundle, folder: str | Path, *, dtype: str | None = None) -> None:
    """Writes a pipeline folder: UNet, VAE, text encoder, tokenizer, scheduler, safety checker, CLIP, defaults.

    The CLIP's text tower is written from the text encoder, which it is in a checkpoint that pictures can prompt.

    Args:
        folder: must not exist, or be empty. It appears under its name only when it is whole.
        dtype: of the stored weights, such as `float16`; as they are in memory if None.

    Raises:
        InputError: there is something at `folder`, the dtype is none or cannot hold a weight, or the CLIP's text
            tower has layers that the text encoder lacks.
    """
    check_dtype(dtype)
    config = bundle.config
    if config.clip is not None:
        own = config.text_towers[_clip_tower(config)]
        for name, there, expected in (
            ("layers", config.clip_text.num_hidden_layers, own.num_hidden_layers),
            ("channels", config.clip_text.hidden_size, own.hidden_size),
        ):
            if there != expected:
                raise InputError(
                    f"the CLIP's text tower has {there} {name} and the text encoder {expected}, expected as many: "
                    "what is not in memory cannot be saved, use the CLIP's own folder with --clip"
                )
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{folder}: found something there, expected a new folder: choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        whole = Path(temporary, "whole")
        whole.mkdir()
        _write(bundle, whole, dtype)
        whole.rename(target)


def _clip_tower(config: Config) -> str:
    """The text encoder that is the CLIP's text tower, if one is."""
    return "text_encoder_2" if config.clip_is_second_tower else "text_encoder"


def _write(bundle: Bundle, folder: Path, dtype: str | None) -> None:
    config, params = bundle.config, bundle.params
    for component, part in (("unet", config.unet), ("vae", config.vae)):
        _write_json(folder / component / "config.json", _diffusers_json(part))
        _write_weights(folder / component / "diffusion_pytorch_model.safetensors", params[component], dtype)
    for suffix, (text, tokens), kind in zip(("", "_2"), config.towers, _TEXT_CLASSES, strict=False):
        _write_json(folder / f"text_encoder{suffix}/config.json", _text_json(text, tokens) | {"architectures": [kind]})
        _write_weights(folder / f"text_encoder{suffix}/model.safetensors", params[f"text_encoder{suffix}"], dtype)
        write_tokenizer(config, folder / f"tokenizer{suffix}")
    _write_json(folder / "scheduler/scheduler_config.json", config.scheduler.to_json())
    _write_json(folder / "sdipc.json", config.defaults.model_dump(exclude_none=True))
    if config.clip is not None:
        clip = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.clip.projection_dim,
            "text_config": _text_json(config.text_towers[_clip_tower(config)], config.tokens)
            | {"projection_dim": config.clip.projection_dim},
            "vision_config": _vision_json(config.clip.vision),
        }
        _write_json(folder / "clip/config.json", clip)
        _write_json(folder / "clip/preprocessor_config.json", config.clip.preprocessing.to_json())
        clip_params = dict(params["clip"])
        prompts = config.clip.prompts
        if prompts is not None:
            overwrite = {OVERWRITE: str(prompts.overwrite_first_layer).lower()}
            tree = {"deep_prompts": clip_params.pop("deep_prompts")}
            _write_weights(folder / "clip" / DEEP_PROMPTS_FILE, tree, dtype, overwrite)
        if config.clip.trained_inverse:
            _write_weights(folder / "clip" / INVERSE_FILE, {"inverse": clip_params.pop("inverse")}, dtype)
        _write_weights(folder / "clip/model.safetensors", params[_clip_tower(config)] | clip_params, dtype)
    if config.safety is not None:
        vision = config.safety.vision
        safety = {
            "architectures": ["StableDiffusionSafetyChecker"],
            "model_type": "clip",
            "projection_dim": vision.projection_dim,
            "vision_config": _vision_json(vision),
        }
        _write_json(folder / "safety_checker/config.json", safety)
        _write_json(folder / "feature_extractor/preprocessor_config.json", config.safety.preprocessing.to_json())
        _write_weights(folder / "safety_checker/model.safetensors", params["safety_checker"], dtype)
    _write_json(folder / "model_index.json", _model_index(config))


def check_dtype(dtype: str | None) -> None:
    """Refuses a dtype that files of weights do not have."""
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")


def _model_index(config: Config) -> dict[str, Any]:
    safe, second = config.safety is not None, config.text_2 is not None
    index = {
        "_diffusers_version": _DIFFUSERS_VERSION,
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if safe else [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", config.scheduler.to_json().get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if second:
        return index | {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": config.force_zeros_for_empty_prompt,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    return index | {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": safe,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if safe else [None, None],
    }


def _diffusers_json(part: Architecture) -> dict[str, Any]:
    return {"_class_name": part.CLASS_NAME, "_diffusers_version": _DIFFUSERS_VERSION} | part.to_json()


def _text_json(text: CLIPTextConfig, tokens: SpecialTokens) -> dict[str, Any]:
    special = {"bos_token_id": tokens.start, "eos_token_id": tokens.end, "pad_token_id": tokens.pad}
    return text.to_json() | special | {"model_type": "clip_text_model"}


def _vision_json(vision: CLIPVisionConfig) -> dict[str, Any]:
    return vision.to_json() | {"model_type": "clip_vision_model"}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(
    path: Path, params: Params, dtype: str | None, metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    tensors = stored_tensors(params, dtype)
    write_tensors(tensors, path, {"format": "pt", **metadata})


def write_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with the rights that the user's other files get; safetensors' own are private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(metadata))
    path.chmod(mode)


def stored_tensors(params: Params, dtype: str | None) -> dict[str, np.ndarray]:
    """A tree's leaves under PyTorch's names and in its layouts, as a file has them.

    Args:
        dtype: to store them in; as they are in memory if None.

    Raises:
        InputError: the dtype cannot hold a weight.
    """

    def stored(leaf_path: tuple[str, ...], leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        if dtype is not None:
            with np.errstate(over="ignore"):  # Told below, by name.
                array = array.astype(jnp.dtype(dtype))
        if not np.isfinite(array).all():
            raise InputError(
                f"{torch_name(leaf_path)} holds NaN or infinity as {array.dtype}, expected finite weights: "
                "save as float32 or bfloat16"
            )
        return np.asarray(to_torch(leaf_path, array), order="C")

    return {torch_name(leaf_path): stored(leaf_path, leaf) for leaf_path, leaf in flatten(params).items()}
