"""A diffusers folder and its CLIP, into a bundle."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sdipc_jax.checkpoints.bundle import Bundle, Config, Params, SpecialTokens, with_fit
from sdipc_jax.checkpoints.checks import check_counts, check_kind, check_noise_levels, check_projection, check_towers
from sdipc_jax.checkpoints.controlnets import load_controlnets
from sdipc_jax.checkpoints.delta import apply_delta, load_delta
from sdipc_jax.checkpoints.dummies import check_second_tower
from sdipc_jax.checkpoints.embeddings import load_rows, with_embeddings
from sdipc_jax.checkpoints.families import FAMILIES, Family, family_for
from sdipc_jax.checkpoints.hub import PARTS
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE, flatten, unflatten
from sdipc_jax.checkpoints.lora import with_loras
from sdipc_jax.checkpoints.lora_changes import changes_of
from sdipc_jax.checkpoints.parts import CLASSES, read_json, read_part
from sdipc_jax.checkpoints.shapes import PREDICTIONS, family_of, prediction_of
from sdipc_jax.checkpoints.sides import read_clip, read_safety
from sdipc_jax.checkpoints.single import open_single
from sdipc_jax.checkpoints.sources import EMBEDDED, find
from sdipc_jax.checkpoints.tensors import RUNS_CODE, cast, load_tree
from sdipc_jax.checkpoints.tokenizer import special_tokens
from sdipc_jax.errors import InputError, one_line, printable
from sdipc_jax.models import CLIPTextConfig, UNetConfig, VAEConfig
from sdipc_jax.samplers import SchedulerConfig, default_sampler
from sdipc_jax.settings import CheckpointSettings, Defaults, ProjectionSettings, SafetyName, SamplerSettings

# What model_index.json may name, and the configurations of the parts besides.
_PIPELINES = {
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    *("FlaxStableDiffusionPipeline", "FlaxStableDiffusionXLPipeline"),
    "LatentConsistencyModelPipeline",
}
# The parts that options take from elsewhere, and what is fetched for them.
_FETCHED = {"vae": ("vae",), "text_encoder": ("text_encoder", "text_encoder_2")}
# Stands for clip/ in the folder, or else the CLIP of the family.
DEFAULT_CLIP = "default"
_DTYPES = ("float32", "bfloat16", "float16")


def load(
    model: str | Path = "embedded",
    clip: str | Path | None = None,
    tuned: str | Path | None = None,
    *,
    dtype: str = "float32",
    vae_dtype: str | None = None,
    revision: str | None = None,
    safety: SafetyName = "auto",
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
) -> Bundle:
    """Loads a checkpoint.

    Args:
        model: `embedded`, an alias, an id on the hub (`ORG/NAME[@REVISION]`), a diffusers pipeline folder, or a single
            `.safetensors` file.
        clip: a transformers CLIP, the same; by default `clip/` in the model's folder. `default` is that one or the
            CLIP of the checkpoint's family, from the hub.
        tuned: a tuning's delta file, made for this checkpoint.
        dtype: of the weights and arithmetic of UNet, CLIP and VAE, `float32`, `bfloat16` or `float16`.
        vae_dtype: of the VAE alone. If None it is float32 where its file asks for that (`force_upcast`), in SDXL and
            with float16.
        revision: of the model on the hub: a branch, a tag or a commit.
        safety: `auto` has the safety checker where the checkpoint does, `on` refuses one without, `off` does without.
        vae, text_encoder: folders, files or ids to take these parts from; both of SDXL's text encoders from one.
        prediction_type: `epsilon` or `v_prediction`, where the checkpoint does not say it rightly.
        ema: take the moving average of the UNet's weights that a single file has beside them.

    Raises:
        InputError: no such folder, an unknown class or option, weights that do not fit, a delta for another checkpoint.
    """
    config = read_config(
        model,
        clip,
        dtype=dtype,
        vae_dtype=vae_dtype,
        revision=revision,
        safety=safety,
        vae=vae,
        text_encoder=text_encoder,
        prediction_type=prediction_type,
        ema=ema,
    )
    return load_weights(config, tuned)


def read_config(
    model: str | Path = "embedded",
    clip: str | Path | None = None,
    *,
    dtype: str = "float32",
    vae_dtype: str | None = None,
    revision: str | None = None,
    safety: SafetyName = "auto",
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
) -> Config:
    """Reads all that is known of a checkpoint without its weights, and checks that the parts fit. See `load`."""
    for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
        if value not in _DTYPES and (name, value) != ("vae_dtype", None):
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(_DTYPES)}")
    if safety not in get_args(SafetyName):
        raise InputError(f"safety is {safety!r}, expected one of {', '.join(get_args(SafetyName))}")
    if prediction_type not in (None, *PREDICTIONS):
        raise InputError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTIONS)}")
    given = {"model": model, "vae": vae, "text_encoder": text_encoder, "clip": None if clip == DEFAULT_CLIP else clip}
    sources = {
        part: find(name, revision if part == "model" else None, _FETCHED.get(part, PARTS))
        for part, name in given.items()
        if name is not None
    }
    folder = _check_model(sources["model"].path, safety)
    elsewhere = _given_parts({part: sources[part].path for part in _FETCHED if part in sources})

    def place(part: str) -> Path:
        return elsewhere.get(part) or (folder if folder.is_file() else folder / part)

    schedule, notes = _read_scheduler(folder, prediction_type, ema)
    predicted = schedule.get("prediction_type", "epsilon")
    unet = UNetConfig.from_json(read_part(place("unet"), "unet", predicted), "unet/config.json")
    family = family_for(
        unet.cross_attention_dim, linear=unet.use_linear_projection, added=unet.addition_embed_type is not None
    )
    decoder = VAEConfig.from_json(read_part(place("vae"), "vae", family=family), "vae/config.json")
    text = _read_text(place("text_encoder"), "text_encoder", family)
    for name, part in (("unet", unet), ("vae", decoder)):
        check_counts(f"{name}/config.json", part)
    latent, takes, gives = decoder.latent_channels, unet.in_channels, unet.out_channels
    if latent != gives or not (unet.repaints or takes == gives):
        raise InputError(
            f"{folder}: the UNet takes {takes} and gives {gives} channels, expected the VAE's {latent}, or twice as "
            "many and a mask to repaint: other checkpoints are not supported"
        )
    reads_two = unet.addition_embed_type is not None
    if not reads_two:
        elsewhere.pop("text_encoder_2", None)
    there = place("text_encoder_2")
    second = there.is_dir() or (there.is_file() and (reads_two or "text_encoder_2" in open_single(there)))
    text_2 = _read_text(there, "text_encoder_2", family) if second else None
    check_towers(printable(folder), unet, text, text_2)
    if text_2 is not None and there.is_file():
        check_second_tower(there, text_2.num_hidden_layers)
    tokens = read_tokens(folder, text)
    if clip == DEFAULT_CLIP and not (folder / "clip").is_dir():
        known = next((family for family in FAMILIES if family.width == unet.cross_attention_dim), None)
        sources |= {} if known is None else {"clip": find(known.clip)}
    scheduler = SchedulerConfig.from_json(schedule)
    config = Config(
        folder=str(folder),
        unet=unet,
        vae=decoder,
        text=text,
        scheduler=scheduler,
        tokens=tokens,
        defaults=_read_defaults(
            folder, unet.sample_size * decoder.downscale, default_sampler(scheduler), sources["model"].defaults
        ),
        clip=read_clip(folder, sources["clip"].path if "clip" in sources else None),
        safety=None if safety == "off" else read_safety(folder, safety),
        dtype=dtype,
        text_2=text_2,
        tokens_2=None if text_2 is None else _read_tokens_2(folder, text_2, tokens),
        force_zeros_for_empty_prompt=text_2 is not None and _forces_zeros(folder),
        vae_dtype=vae_dtype,
        elsewhere=tuple((part, str(path)) for part, path in elsewhere.items()),
        average=ema,
        notes=(*(source.note for source in sources.values() if source.note), *notes),
        origins=tuple((part, source.origin) for part, source in sources.items() if source.origin),
    )
    config.latent_shape(config.defaults.height, config.defaults.width)
    return config


def configure(settings: CheckpointSettings) -> Config:
    """The configuration of the checkpoint that a command's settings ask for. See `read_config`."""
    safety = settings.safety if isinstance(settings, SamplerSettings) else "auto"
    config = read_config(
        settings.model,
        DEFAULT_CLIP if settings.clip is None and isinstance(settings, ProjectionSettings) else settings.clip,
        dtype=settings.dtype,
        vae_dtype=settings.vae_dtype,
        revision=settings.revision,
        safety=safety,
        vae=settings.vae,
        text_encoder=settings.text_encoder,
        prediction_type=settings.prediction_type,
        ema=settings.ema,
    )
    if settings.clip_skip >= config.text.num_hidden_layers:
        raise InputError(
            f"clip_skip is {settings.clip_skip}, expected less than the text encoder's {config.text.num_hidden_layers} "
            "layers: lower it"
        )
    config = dataclasses.replace(config, clip_skip=settings.clip_skip)
    fit = settings.fit if isinstance(settings, ProjectionSettings) else "crop"
    return with_fit(with_embeddings(with_loras(config, settings), settings.embedding), fit)


# What loads a checkpoint is called so elsewhere.
from_pretrained = load


def load_weights(config: Config, tuned: str | Path | None = None, *, only: tuple[str, ...] = ()) -> Bundle:
    """Loads the weights that a configuration asks for, one tensor at a time, and applies a delta file. See `load`.

    Args:
        only: the components to read, such as `clip`; all if none are named, or where a delta has to be compared.
    """
    if tuned is not None and "float16" in (config.dtype, config.vae_dtype):
        # Digests are of bfloat16, whose numbers float16 does not hold: cast once the tuning is compared and applied.
        whole = load_weights(dataclasses.replace(config, dtype="float32", vae_dtype="float32"), tuned, only=only)
        config = dataclasses.replace(whole.config, dtype=config.dtype, vae_dtype=config.vae_dtype)
        leaves, expected = flatten(whole.params), flatten(config.abstract_params())
        del whole
        for path in leaves:
            leaves[path] = cast(path, leaves[path], expected[path])
        return Bundle(unflatten(leaves), config)
    delta = None if tuned is None else load_delta(tuned)
    expected_params = config.abstract_params()
    params = {"embeddings": load_rows(config)} if expected_params.pop("embeddings", None) else {}
    if expected_params.pop("controlnets", None):
        params["controlnets"] = load_controlnets(config)
    for component, expected in expected_params.items():
        if only and delta is None and component not in only:
            continue
        unused: tuple[str, ...] = ()
        trained: Params = {}
        folder = config.place(component)
        average = config.average and component == "unet"
        if component == "clip" and config.clip is not None:
            # The text states come from text_encoder/: the CLIP's own text tower is read by calibration alone.
            folder, unused = Path(config.clip.folder), ("text_model.",)
            for part, file in (("deep_prompts", DEEP_PROMPTS_FILE), ("inverse", INVERSE_FILE)):
                if part in expected:
                    added = {part: expected.pop(part)}
                    trained |= load_tree(folder, component, added, files=[folder / file])
        changes = changes_of(config.loras, component)
        params[component] = (
            load_tree(folder, component, expected, unused_prefixes=unused, changes=changes, average=average) | trained
        )
        if component == "text_encoder_2":
            # Whatever SDXL's UNet reads of a text's meaning as a whole goes through it.
            kernel = np.asarray(params[component]["text_projection"]["kernel"], np.float32)
            check_projection(kernel, f"{printable(folder)}: text_encoder_2")
    bundle = Bundle(params, config)
    return bundle if delta is None else apply_delta(bundle, delta)


def _check_model(folder: Path, safety: SafetyName) -> Path:
    """Refuses what is no checkpoint, as far as can be told without opening its parts."""
    name = printable(folder)
    if folder.is_file():
        if folder.suffix in RUNS_CODE:
            raise InputError(
                f"{name}: found a {folder.suffix} file, expected safetensors: such a file can run code when it is "
                "opened, use the same checkpoint as .safetensors"
            )
        return folder
    if folder == EMBEDDED and not folder.is_dir():
        raise InputError("the embedded checkpoint is not part of this installation: pass --model FOLDER")
    if not (folder / "unet").is_dir():
        raise InputError(
            f"{name}: not a checkpoint, expected a diffusers pipeline folder with unet/, vae/, text_encoder/, "
            "tokenizer/ and scheduler/: give another folder"
        )
    if (folder / "model_index.json").is_file():
        _check_index(folder, read_json(folder, "model_index.json"), safety)
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
        known = CLASSES.get(name, set()) - CLASSES["clip"]
        if str(entry[-1]) not in known:
            expected = " or ".join(sorted(known)) or "no such part"
            raise InputError(f"{where}: {name} is a {entry[-1]}, expected {expected}: use another checkpoint")
        if name == "safety_checker" and safety != "off" and not (folder / name).is_dir():
            raise InputError(
                f"{where}: names a safety_checker, but there is no such folder: fetch the whole checkpoint, or pass "
                "--safety off"
            )


def _given_parts(places: Mapping[str, Path]) -> dict[str, Path]:
    """The folders or files that options name, or the parts' folders in them. One may have both text encoders."""
    found = {part: place / part if (place / part).is_dir() else place for part, place in places.items()}
    if (text := places.get("text_encoder")) is not None:
        if (text / "text_encoder_2").is_dir():
            found["text_encoder_2"] = text / "text_encoder_2"
        elif text.is_file() and "text_encoder_2" in open_single(text):
            found["text_encoder_2"] = text
    return found


def _read_scheduler(folder: Path, asked: str | None, ema: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The scheduler's file, or that of a single file's family, and what was chosen there."""
    if not folder.is_file():
        if ema:
            raise InputError(f"{printable(folder)}: found a folder, expected a single file for --ema: leave --ema out")
        values = read_json(folder, "scheduler/scheduler_config.json")
        check_noise_levels(f"{printable(folder)}: scheduler/scheduler_config.json", str(values.get("_class_name")))
        return values | ({} if asked is None else {"prediction_type": asked}), ()
    single = open_single(folder)
    family = family_of(single)
    choice = prediction_of(single, family, asked)
    if ema and not single.has_average:
        raise InputError(f"{single.name}: found no moving average (EMA) of the weights: leave --ema out")
    values = family.scheduler(choice.value) | ({"rescale_betas_zero_snr": True} if single.zero_snr else {})
    weights = ", its moving average" if ema else ", not the moving average beside it" if single.has_average else ""
    note = f"{folder.name}: {family.title} by its shapes, {choice.value} by {choice.source}{weights}"
    return values, (printable(note),)


def _read_text(place: Path, component: str, family: Family) -> CLIPTextConfig:
    text = CLIPTextConfig.from_json(read_part(place, component, family=family), f"{component}/config.json")
    check_counts(f"{component}/config.json", text)
    return text


def _forces_zeros(folder: Path) -> bool:
    index = read_json(folder, "model_index.json") if (folder / "model_index.json").is_file() else {}
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
        reason = one_line(error)[:200]
        raise InputError(
            f"{printable(folder / name)}: not readable ({reason}), expected a CLIP tokenizer: fetch it again"
        ) from None


def _read_defaults(folder: Path, size: int, sampler: str, asked: Mapping[str, Any]) -> Defaults:
    values: dict[str, Any] = {"height": size, "width": size, "sampler": sampler} | dict(asked)
    if (folder / "sdipc.json").is_file():
        values |= read_json(folder, "sdipc.json")
    try:
        return Defaults(**values)
    except InputError as error:
        raise InputError(f"{printable(folder / 'sdipc.json')}: {error}") from None
