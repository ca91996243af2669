"""A diffusers folder and its CLIP, into a bundle."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from sdipc_jax.checkpoints.bundle import Bundle, Config, Params, SafetySide, SpecialTokens, VisionSide, with_fit
from sdipc_jax.checkpoints.checks import check_counts, check_kind, check_towers
from sdipc_jax.checkpoints.delta import apply_delta, load_delta
from sdipc_jax.checkpoints.embeddings import load_rows, with_embeddings
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE, OVERWRITE
from sdipc_jax.checkpoints.lora import with_loras
from sdipc_jax.checkpoints.lora_changes import changes_of
from sdipc_jax.checkpoints.tensors import load_tree, read_header, read_metadata
from sdipc_jax.checkpoints.tokenizer import special_tokens
from sdipc_jax.errors import InputError, printable
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from sdipc_jax.models.deep_prompts import DeepPrompts
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.samplers import SchedulerConfig, default_sampler
from sdipc_jax.settings import CheckpointSettings, Defaults, ProjectionSettings, SafetyName, SamplerSettings

EMBEDDED = Path(__file__).parent.parent / "embedded"

# What model_index.json may name, and the configurations of the parts besides.
_PIPELINES = {
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    *("FlaxStableDiffusionPipeline", "FlaxStableDiffusionXLPipeline"),
    "LatentConsistencyModelPipeline",
}
_CLASSES: dict[str, set[str]] = {
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL"},
    "text_encoder": {"CLIPTextModel"},
    "text_encoder_2": {"CLIPTextModelWithProjection"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "tokenizer_2": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "safety_checker": {"StableDiffusionSafetyChecker"},
    "feature_extractor": {"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"},
    "image_encoder": set(),
    "clip": {"CLIPModel"},
}
_MODEL_TYPES = {
    "text_encoder": "clip_text_model",
    "text_encoder_2": "clip_text_model",
    "clip": "clip",
    "safety_checker": "clip",
}
_DTYPES = ("float32", "bfloat16", "float16")


def load(
    model: str | Path = "embedded",
    clip: str | Path | None = None,
    tuned: str | Path | None = None,
    *,
    dtype: str = "float32",
    vae_dtype: str | None = None,
    safety: SafetyName = "auto",
) -> Bundle:
    """Loads a checkpoint.

    Args:
        model: `embedded` or a diffusers pipeline folder.
        clip: a transformers CLIP folder; by default `clip/` in the model's folder.
        tuned: a tuning's delta file, made for this checkpoint.
        dtype: of the weights and arithmetic of UNet, CLIP and VAE, `float32`, `bfloat16` or `float16`.
        vae_dtype: of the VAE alone. If None it is float32 where its file asks for that (`force_upcast`), in SDXL and
            with float16.
        safety: `auto` has the safety checker where the checkpoint does, `on` refuses one without, `off` does without.

    Raises:
        InputError: no such folder, an unknown class or option, weights that do not fit, a delta for another checkpoint.
    """
    return load_weights(read_config(model, clip, dtype=dtype, vae_dtype=vae_dtype, safety=safety), tuned)


def read_config(
    model: str | Path = "embedded",
    clip: str | Path | None = None,
    *,
    dtype: str = "float32",
    vae_dtype: str | None = None,
    safety: SafetyName = "auto",
) -> Config:
    """Reads all that is known of a checkpoint without its weights, and checks that the parts fit. See `load`."""
    for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
        if value not in _DTYPES and (name, value) != ("vae_dtype", None):
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(_DTYPES)}")
    if safety not in get_args(SafetyName):
        raise InputError(f"safety is {safety!r}, expected one of {', '.join(get_args(SafetyName))}")
    folder = _model_folder(model, safety)
    unet = UNetConfig.from_json(_read_part(folder / "unet", "unet"), "unet/config.json")
    vae = VAEConfig.from_json(_read_part(folder / "vae", "vae"), "vae/config.json")
    text = _read_text(folder, "text_encoder")
    for name, part in (("unet", unet), ("vae", vae)):
        check_counts(f"{name}/config.json", part)
    if vae.latent_channels != unet.out_channels or not (unet.repaints or unet.in_channels == unet.out_channels):
        raise InputError(
            f"{folder}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels, expected the "
            f"VAE's {vae.latent_channels}, or twice as many and a mask to repaint: other checkpoints are not supported"
        )
    text_2 = _read_text(folder, "text_encoder_2") if (folder / "text_encoder_2").is_dir() else None
    check_towers(printable(folder), unet, text, text_2)
    tokens = read_tokens(folder, text)
    scheduler = SchedulerConfig.from_json(_read_json(folder, "scheduler/scheduler_config.json"))
    config = Config(
        folder=str(folder),
        unet=unet,
        vae=vae,
        text=text,
        scheduler=scheduler,
        tokens=tokens,
        defaults=_read_defaults(folder, unet.sample_size * vae.downscale, default_sampler(scheduler)),
        clip=_read_clip(folder, clip),
        safety=None if safety == "off" else _read_safety(folder, safety),
        dtype=dtype,
        text_2=text_2,
        tokens_2=None if text_2 is None else _read_tokens_2(folder, text_2, tokens),
        force_zeros_for_empty_prompt=text_2 is not None and _forces_zeros(folder),
        vae_dtype=vae_dtype,
    )
    config.latent_shape(config.defaults.height, config.defaults.width)
    return config


def configure(settings: CheckpointSettings) -> Config:
    """The configuration of the checkpoint that a command's settings ask for. See `read_config`."""
    safety = settings.safety if isinstance(settings, SamplerSettings) else "auto"
    options: dict[str, Any] = {"dtype": settings.dtype, "vae_dtype": settings.vae_dtype, "safety": safety}
    config = read_config(settings.model, settings.clip, **options)
    if settings.clip_skip >= config.text.num_hidden_layers:
        raise InputError(
            f"clip_skip is {settings.clip_skip}, expected less than the text encoder's {config.text.num_hidden_layers} "
            "layers: lower it"
        )
    config = dataclasses.replace(config, clip_skip=settings.clip_skip)
    fit = settings.fit if isinstance(settings, ProjectionSettings) else "crop"
    return with_fit(with_embeddings(with_loras(config, settings), settings.embedding), fit)


def load_weights(config: Config, tuned: str | Path | None = None) -> Bundle:
    """Loads the weights that a configuration asks for, one tensor at a time, and applies a delta file. See `load`."""
    if tuned is not None and config.dtype == "float16":
        raise InputError(
            "dtype is float16, in which a tuning cannot be compared with its checkpoint: use float32 or bfloat16"
        )
    delta = None if tuned is None else load_delta(tuned)
    expected_params = config.abstract_params()
    params = {"embeddings": load_rows(config)} if expected_params.pop("embeddings", None) else {}
    for component, expected in expected_params.items():
        unused: tuple[str, ...] = ()
        trained: Params = {}
        folder = Path(config.folder, component)
        if component == "clip" and config.clip is not None:
            # The text states come from text_encoder/: the CLIP's own text tower is read by calibration alone.
            folder, unused = Path(config.clip.folder), ("text_model.",)
            for part, file in (("deep_prompts", DEEP_PROMPTS_FILE), ("inverse", INVERSE_FILE)):
                if part in expected:
                    added = {part: expected.pop(part)}
                    trained |= load_tree(folder, component, added, files=[folder / file])
        changes = changes_of(config.loras, component)
        params[component] = load_tree(folder, component, expected, unused_prefixes=unused, changes=changes) | trained
    bundle = Bundle(params, config)
    return bundle if delta is None else apply_delta(bundle, delta)


def _model_folder(model: str | Path, safety: SafetyName) -> Path:
    folder = EMBEDDED if model == "embedded" else Path(model)
    name = printable(model)
    if folder.is_file():
        raise InputError(f"{name}: single files are not supported yet: convert to a folder")
    if model == "embedded" and not folder.is_dir():
        raise InputError("the embedded checkpoint is not part of this installation: pass --model FOLDER")
    if not folder.is_dir():
        raise InputError(
            f"{name}: no such folder, expected 'embedded' or a diffusers pipeline folder: names and hub ids are not "
            "supported yet, download the checkpoint and give its folder"
        )
    if not (folder / "unet").is_dir():
        raise InputError(
            f"{name}: not a checkpoint, expected a diffusers pipeline folder with unet/, vae/, text_encoder/, "
            "tokenizer/ and scheduler/: give another folder"
        )
    if (folder / "model_index.json").is_file():
        _check_index(folder, _read_json(folder, "model_index.json"), safety)
    return folder


def _check_index(folder: Path, index: Mapping[str, Any], safety: SafetyName) -> None:
    """Refuses parts and classes that are not built; nothing is ever imported by its name."""
    where = f"{printable(folder)}: model_index.json"
    pipeline = str(index.get("_class_name", "StableDiffusionPipeline"))
    if pipeline not in _PIPELINES:
        raise InputError(f"{where}: found a {pipeline}, expected a StableDiffusionPipeline: use another checkpoint")
    check_kind(where, index)
    for name, entry in index.items():
        if name == "scheduler" or not isinstance(entry, list) or not entry or entry[-1] is None:
            continue
        known = _CLASSES.get(name, set()) - _CLASSES["clip"]
        if str(entry[-1]) not in known:
            expected = " or ".join(sorted(known)) or "no such part"
            raise InputError(f"{where}: {name} is a {entry[-1]}, expected {expected}: use another checkpoint")
        if name == "safety_checker" and safety != "off" and not (folder / name).is_dir():
            raise InputError(
                f"{where}: names a safety_checker, but there is no such folder: fetch the whole checkpoint, or pass "
                "--safety off"
            )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    shown = printable(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{shown}: not found, expected a whole checkpoint folder: fetch it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{shown}: not readable ({error}), expected a JSON object: fetch it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{shown}: holds {type(values).__name__}, expected a JSON object: fetch it again")
    return values


def _read_part(folder: Path, component: str) -> dict[str, Any]:
    """A part's config.json, whose class must be the one that is built."""
    values = _read_json(folder, "config.json")
    for key in ("_class_name", "architectures"):
        found = values.get(key) or []
        for each in found if isinstance(found, list) else [found]:
            if str(each) not in _CLASSES[component]:
                raise InputError(
                    f"{component}/config.json: {key} is {each!r}, expected {min(_CLASSES[component])!r}: "
                    "use a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
                )
    kind = values.get("model_type")
    if kind not in (None, _MODEL_TYPES.get(component)):
        raise InputError(
            f"{component}/config.json: model_type is {kind!r}, expected {_MODEL_TYPES.get(component)!r}: "
            "use a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
        )
    return values


def _read_text(folder: Path, component: str) -> CLIPTextConfig:
    text = CLIPTextConfig.from_json(_read_part(folder / component, component), f"{component}/config.json")
    check_counts(f"{component}/config.json", text)
    return text


def _forces_zeros(folder: Path) -> bool:
    index = _read_json(folder, "model_index.json") if (folder / "model_index.json").is_file() else {}
    return bool(index.get("force_zeros_for_empty_prompt", True))


def _read_tokens_2(folder: Path, text: CLIPTextConfig, first: SpecialTokens) -> SpecialTokens:
    """Those of SDXL's second tokenizer, which frames texts as the first one does but for the pad."""
    tokens = read_tokens(folder, text, "tokenizer_2")
    if dataclasses.replace(tokens, pad=first.pad) != first:
        raise InputError(
            f"{printable(folder)}: tokenizer_2 frames texts with {tokens} and tokenizer with {first}, expected the "
            "same but for the pad: fetch the whole checkpoint"
        )
    return tokens


def read_tokens(folder: Path, text: CLIPTextConfig, name: str = "tokenizer") -> SpecialTokens:
    """The tokens that a tokenizer frames texts with. See `special_tokens`."""
    try:
        return special_tokens(folder, text, name)
    except InputError:
        raise
    except Exception as error:  # Whatever transformers and tokenizers raise: for some files that is almost anything.
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{printable(folder / name)}: not readable ({reason}), expected a CLIP tokenizer: fetch it again"
        ) from None


def _read_defaults(folder: Path, size: int, sampler: str) -> Defaults:
    values: dict[str, Any] = {"height": size, "width": size, "sampler": sampler}
    if (folder / "sdipc.json").is_file():
        values |= _read_json(folder, "sdipc.json")
    try:
        return Defaults(**values)
    except InputError as error:
        raise InputError(f"{printable(folder / 'sdipc.json')}: {error}") from None


def _read_clip(folder: Path, clip: str | Path | None) -> VisionSide | None:
    clip_folder = folder / "clip" if clip is None else Path(clip)
    if clip is None and not clip_folder.is_dir():
        return None
    if clip_folder.is_file():
        raise InputError(f"{printable(clip_folder)}: single files are not supported yet: convert to a folder")
    if not clip_folder.is_dir():
        raise InputError(
            f"{printable(clip_folder)}: no such folder, expected a transformers CLIP folder: names and hub ids are not "
            "supported yet, download the CLIP and give its folder"
        )
    values = _read_part(clip_folder, "clip")
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
    preprocessing = Preprocessing.from_json(
        _read_json(clip_folder, "preprocessor_config.json"), f"{clip_folder.name}/preprocessor_config.json"
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


def _read_safety(folder: Path, safety: SafetyName) -> SafetySide | None:
    if not (folder / "safety_checker").is_dir():
        if safety == "on":
            raise InputError(
                f"{printable(folder)}: no safety_checker/ folder, expected one with --safety on: fetch the whole "
                "checkpoint, or leave the option out"
            )
        return None
    source = "safety_checker/config.json"
    values = _read_part(folder / "safety_checker", "safety_checker")
    vision = _clip_part(CLIPVisionConfig, values, "vision_config", source)
    check_counts(f"{source}: vision_config", vision)
    vision = dataclasses.replace(vision, projection_dim=_projection_dim(values, source))
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
