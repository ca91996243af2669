"""A diffusers folder and its CLIP, into a bundle."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from sdipc_jax.bundle import Bundle, Config, Params, SafetySide, VisionSide
from sdipc_jax.checkpoints.delta import apply_delta, load_delta
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE, OVERWRITE
from sdipc_jax.checkpoints.tensors import load_tree, read_header, read_metadata
from sdipc_jax.errors import InputError
from sdipc_jax.images import Preprocessing
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from sdipc_jax.models.deep_prompts import DeepPrompts
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults
from sdipc_jax.tokens import special_tokens

EMBEDDED = Path(__file__).parent.parent / "embedded"

_CLASSES: dict[str, set[str]] = {
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL"},
    "text_encoder": {"CLIPTextModel"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "safety_checker": {"StableDiffusionSafetyChecker"},
    "feature_extractor": {"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"},
    "image_encoder": set(),
}
_DTYPES = ("float32", "bfloat16")


def load(
    model: str | Path = "embedded",
    clip: str | Path | None = None,
    tuned: str | Path | None = None,
    *,
    dtype: str = "float32",
) -> Bundle:
    """Loads a checkpoint.

    Args:
        model: `embedded` or a diffusers pipeline folder.
        clip: a transformers CLIP folder; by default `clip/` in the model's folder.
        tuned: a tuning's delta file, made for this checkpoint.
        dtype: of the weights and arithmetic of UNet, CLIP and VAE, `float32` or `bfloat16`.

    Raises:
        InputError: no such folder, an unknown class or option, weights that do not fit, a delta for another checkpoint.
    """
    delta = None if tuned is None else load_delta(tuned)
    bundle = load_weights(read_config(model, clip, dtype=dtype))
    return bundle if delta is None else apply_delta(bundle, delta)


def read_config(model: str | Path = "embedded", clip: str | Path | None = None, *, dtype: str = "float32") -> Config:
    """Reads all that is known of a checkpoint without its weights, and checks that the parts fit. See `load`."""
    if dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    folder = _model_folder(model)
    unet = UNetConfig.from_json(_read_json(folder, "unet/config.json"), "unet/config.json")
    vae = VAEConfig.from_json(_read_json(folder, "vae/config.json"), "vae/config.json")
    text = CLIPTextConfig.from_json(_read_json(folder, "text_encoder/config.json"), "text_encoder/config.json")
    if text.hidden_size != unet.cross_attention_dim:
        raise InputError(
            f"{folder}: the text encoder's states are {text.hidden_size} wide but the UNet reads "
            f"{unet.cross_attention_dim}-wide prompts: use the parts of one checkpoint together"
        )
    if vae.latent_channels != unet.in_channels or unet.out_channels != unet.in_channels:
        raise InputError(
            f"{folder}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels, expected the "
            f"VAE's {vae.latent_channels}: inpainting and depth checkpoints are not supported"
        )
    config = Config(
        folder=str(folder),
        unet=unet,
        vae=vae,
        text=text,
        scheduler=SchedulerConfig.from_json(_read_json(folder, "scheduler/scheduler_config.json")),
        tokens=special_tokens(folder, text),
        defaults=_read_defaults(folder, unet.sample_size * vae.downscale),
        clip=_read_clip(folder, clip, text),
        safety=_read_safety(folder),
        dtype=dtype,
    )
    config.latent_shape(config.defaults.height, config.defaults.width)
    return config


def load_weights(config: Config) -> Bundle:
    """Loads the weights that a configuration asks for, one tensor at a time."""
    params = {}
    for component, expected in config.abstract_params().items():
        unused: tuple[str, ...] = ()
        tuned: Params = {}
        folder = Path(config.folder, component)
        if component == "clip" and config.clip is not None:
            # The text states come from text_encoder/: the CLIP's own text tower is not read.
            folder, unused = Path(config.clip.folder), ("text_model.",)
            for part, file in (("deep_prompts", DEEP_PROMPTS_FILE), ("inverse", INVERSE_FILE)):
                if part in expected:
                    added = {part: expected.pop(part)}
                    tuned |= load_tree(folder, component, added, files=[folder / file])
        params[component] = load_tree(folder, component, expected, unused_prefixes=unused) | tuned
    return Bundle(params, config)


def _model_folder(model: str | Path) -> Path:
    folder = EMBEDDED if model == "embedded" else Path(model)
    if folder.is_file():
        raise InputError(f"{model}: single files are not supported yet: convert to a folder")
    if not folder.is_dir():
        raise InputError(f"{model}: no such folder, expected 'embedded' or a diffusers pipeline folder")
    if not (folder / "unet").is_dir():
        raise InputError(
            f"{model}: not a checkpoint, expected a diffusers pipeline folder with unet/, vae/, text_encoder/, "
            "tokenizer/ and scheduler/"
        )
    index = folder / "model_index.json"
    if index.is_file():
        for name, entry in _read_json(folder, "model_index.json").items():
            known = _CLASSES.get(name)
            found = entry[-1] if isinstance(entry, list) and entry else entry
            if known is not None and found is not None and found not in known:
                expected = " or ".join(sorted(known)) or "none"
                raise InputError(f"{index}: {name} is a {found}, expected {expected}: this pipeline is not supported")
    return folder


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found, expected a whole diffusers pipeline folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, expected a JSON object")
    if (component := name.split("/")[0]) in ("unet", "vae"):
        found, known = values.get("_class_name"), _CLASSES[component]
        if found is not None and found not in known:
            raise InputError(f"{path}: _class_name is {found!r}, expected {next(iter(known))!r}")
    return values


def _read_defaults(folder: Path, size: int) -> Defaults:
    values = _read_json(folder, "sdipc.json") if (folder / "sdipc.json").is_file() else {}
    try:
        return Defaults(**({"height": size, "width": size} | values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{folder / 'sdipc.json'}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _read_clip(folder: Path, clip: str | Path | None, text: CLIPTextConfig) -> VisionSide | None:
    clip_folder = folder / "clip" if clip is None else Path(clip)
    if clip is None and not clip_folder.is_dir():
        return None
    if not clip_folder.is_dir():
        raise InputError(f"{clip}: no such folder, expected a transformers CLIP folder")
    values = _read_json(clip_folder, "config.json")
    if "vision_config" not in values or "text_config" not in values:
        raise InputError(f"{clip_folder / 'config.json'}: no vision_config and text_config, expected a whole CLIPModel")
    source = f"{clip_folder.name}/config.json"
    vision = _clip_part(CLIPVisionConfig, values, "vision_config", source)
    clip_text = _clip_part(CLIPTextConfig, values, "text_config", source)
    joint = values.get("projection_dim", 512)
    if clip_text.hidden_size != text.hidden_size:
        raise InputError(
            f"text_projection is ({joint}, {clip_text.hidden_size}) but the UNet reads {text.hidden_size}-wide "
            "prompts: pass --clip with the CLIP this checkpoint was trained with"
        )
    preprocessing = Preprocessing.from_json(
        _read_json(clip_folder, "preprocessor_config.json"), f"{clip_folder.name}/preprocessor_config.json"
    )
    _check_size(preprocessing, vision, clip_folder.name)
    return VisionSide(
        str(clip_folder),
        vision,
        preprocessing,
        joint,
        clip_text.num_hidden_layers,
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


def _read_safety(folder: Path) -> SafetySide | None:
    if not (folder / "safety_checker").is_dir():
        return None
    values = _read_json(folder, "safety_checker/config.json")
    vision = _clip_part(CLIPVisionConfig, values, "vision_config", "safety_checker/config.json")
    vision = dataclasses.replace(vision, projection_dim=values.get("projection_dim", 512))
    preprocessing = Preprocessing.from_json(
        _read_json(folder, "feature_extractor/preprocessor_config.json"), "feature_extractor/preprocessor_config.json"
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


def _clip_part(kind: Any, values: Mapping[str, Any], name: str, source: str) -> Any:
    # transformers lets the old `*_config_dict` win where both are there.
    merged = {**(values.get(name) or {}), **(values.get(f"{name}_dict") or {})}
    return kind.from_json(merged, f"{source}: {name}")
