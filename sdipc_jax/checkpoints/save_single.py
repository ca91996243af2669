"""A bundle, into one `.safetensors` file with the names that CompVis and Stability gave, which most programs read."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.families import ZERO_SNR_MARK, Family, family_for
from sdipc_jax.checkpoints.names_ldm import Piece, open_clip_names, same_names, unet_names, vae_names
from sdipc_jax.checkpoints.save import check_dtype, stored_tensors, write_tensors
from sdipc_jax.checkpoints.shapes import configuration
from sdipc_jax.checkpoints.single import SingleFile
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import rename

_PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
_COMMON = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v_prediction"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}


def save_single(bundle: Bundle, file: str | Path, *, dtype: str | None = None) -> None:
    """Writes UNet, VAE and text towers. Such a file has no CLIP, tokenizer, scheduler or safety checker.

    Args:
        file: must not exist. It appears under its name only when it is whole.
        dtype: of the stored weights, such as `float16`; as they are in memory if None.

    Raises:
        InputError: there is something at `file`, the dtype is none or cannot hold a weight, or the checkpoint is built
            in a way that no single file can say.
    """
    check_dtype(dtype)
    config, target = bundle.config, Path(file)
    if target.exists():
        raise InputError(f"{printable(target)}: found something there, expected a new file: choose another name")
    family = config_family(config)
    prediction = config.scheduler.to_json().get("prediction_type", "epsilon")
    tensors: dict[str, np.ndarray] = {}
    for part, prefix in (_COMMON | _PREFIXES[family.name]).items():
        if part in bundle.params:
            stored = stored_tensors(bundle.params[part], dtype)
            tensors |= {f"{prefix}{name}": array for name, array in _renamed(config, part, prefix, stored).items()}
    if config.scheduler.to_json().get("rescale_betas_zero_snr"):
        tensors[ZERO_SNR_MARK] = np.zeros(0, np.float32)
    metadata = {
        "format": "pt",
        "modelspec.architecture": _ARCHITECTURES.get((family.name, prediction), family.architecture),
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else str(prediction),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".sdipc-{secrets.token_hex(8)}.tmp"
    try:
        write_tensors(tensors, temporary, metadata)
        _check(temporary, config, prediction)
        rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def config_family(config: Config) -> Family:
    """The family of a checkpoint, from its configuration."""
    unet = config.unet
    added = getattr(unet, "addition_embed_type", None) is not None
    return family_for(unet.cross_attention_dim, linear=unet.use_linear_projection, added=added)


def _table(config: Config, part: str, prefix: str, names: Mapping[str, Any]) -> dict[str, Piece]:
    if part == "unet":
        attention = tuple(kind.startswith("CrossAttn") for kind in config.unet.up_block_types)
        return unet_names(names, config.unet.layers_per_block, attention)
    if part == "vae":
        return vae_names(names, len(config.vae.block_out_channels))
    return open_clip_names(names) if prefix.endswith(".model.") else same_names(names)


def _renamed(config: Config, part: str, prefix: str, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for name, piece in _table(config, part, prefix, stored).items():
        array = np.ascontiguousarray(stored[name].T) if piece.transposed else stored[name]
        if part == "vae" and ".attn_1." in piece.name and array.ndim == 2:
            # Convolutions of one pixel there.
            array = array[..., None, None]
        if piece.third is None:
            found[piece.name] = array
        else:
            thirds.setdefault(piece.name, {})[piece.third] = array
    return found | {name: np.concatenate([parts[i] for i in range(3)]) for name, parts in thirds.items()}


def _check(file: Path, config: Config, prediction: str) -> None:
    """Refuses what would be read as another network: heads, groups and activations are in no file."""
    parts: dict[str, Any] = {"unet": config.unet, "vae": config.vae} | config.text_towers
    for part, expected in parts.items():
        found = type(expected).from_json(configuration(SingleFile(file), part, prediction), part)
        ignored = {"sample_size", "projection_dim"}
        for name, value in expected.to_json().items():
            if name not in ignored and found.to_json()[name] != value:
                raise InputError(
                    f"{part}: {name} is {value!r}, but a single file would be read with {found.to_json()[name]!r}: "
                    "write a folder instead"
                )
