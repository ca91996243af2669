"""What tuning changes, in one small file: the trained weights' new values, and the checkpoint that they belong to.

A delta file is safetensors, float32, under PyTorch's names and layouts with the pipeline's part in front
(`unet.down_blocks.0...attn2.to_k.weight`, `clip.deep_prompts.embeddings`, `clip.inverse.weight`). Its metadata say
mode, step and the digest of the checkpoint that was tuned.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array

from sdipc_jax.checkpoints.bundle import Bundle, Config, Params
from sdipc_jax.checkpoints.headers import read_header, read_metadata
from sdipc_jax.checkpoints.keys import OVERWRITE, flatten, from_torch, to_torch, torch_name, torch_shape, unflatten
from sdipc_jax.checkpoints.tensors import to_safetensors
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.models.deep_prompts import CLIPDeepPrompts, DeepPrompts

_EMBEDDINGS = "clip.deep_prompts.embeddings"
_INVERSE = "clip.inverse.weight"
# The safety checker judges pictures and takes no part in making them.
_DIGESTED = ("unet", "vae", "text_encoder", "text_encoder_2", "clip")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tensors", "step"],
    meta_fields=["mode", "base", "overwrite_first_layer"],
)
@dataclass(frozen=True)
class Delta:
    """What a delta file holds.

    Attributes:
        tensors: new values, float32, by PyTorch's names and in its layouts.
        step: steps of training done, ().
        mode: `ft` or `ct`.
        base: digest of the checkpoint that was tuned.
        overwrite_first_layer: how the first layer takes its deep prompts, if there are any.
    """

    tensors: Mapping[str, Array | np.ndarray]
    step: Any
    mode: str
    base: str
    overwrite_first_layer: bool = False


def digest(bundle: Bundle) -> str:
    """The sha256 of a checkpoint's weights rounded to bfloat16: the same whichever dtype they were loaded in."""
    result = hashlib.sha256()
    for component in _DIGESTED:
        leaves = flatten(bundle.params.get(component, {}), (component,))
        for path in sorted(leaves):
            leaf = np.asarray(leaves[path]).astype(ml_dtypes.bfloat16)
            result.update(f"{'/'.join(path)} {leaf.shape}\n".encode())
            result.update(leaf.view(np.uint16).tobytes())
    return result.hexdigest()


def make_delta(trained: Params, step: Any, mode: str, base: str, overwrite_first_layer: bool = False) -> Delta:
    """The delta of trained leaves. Pure.

    Args:
        trained: part of a bundle's tree of parameters, with the new values.
    """
    tensors = {_name(path): to_torch(path, leaf).astype(jnp.float32) for path, leaf in flatten(trained).items()}
    return Delta(tensors, step, mode, base, overwrite_first_layer)


def apply_delta(bundle: Bundle, delta: Delta, *, check: bool = True) -> Bundle:
    """The tuned bundle, which everything takes in the place of the bundle. Pure, but for the check.

    Args:
        bundle: the checkpoint that was tuned.
        check: compare digests. To read all weights takes seconds for a large checkpoint, and is not possible under
            `jit`; leave it out where the bundle is known.

    Raises:
        InputError: the delta was made for another checkpoint, or its tensors do not fit.
    """
    if check and (found := digest(bundle)) != delta.base:
        raise InputError(
            f"the tuning was made for the checkpoint with digest {delta.base}, found {found}: load the one that was "
            "tuned, with the same LoRAs"
        )
    config = tuned_config(bundle.config, delta)
    places, leaves = _places(bundle, config), flatten(bundle.params)
    for name, (path, _, _) in places.items():
        if path not in leaves and name not in delta.tensors:
            raise InputError(f"the tuning has no {name}, expected it beside the others: the file is damaged")
    for name, tensor in delta.tensors.items():
        if name not in places:
            raise InputError(f"the tuning has {name}, which this checkpoint has not: load the one that was tuned")
        path, shape, dtype = places[name]
        if tensor.shape != torch_shape(path, shape):
            raise InputError(
                f"the tuning's {name} has shape {tuple(tensor.shape)}, expected {torch_shape(path, shape)}: "
                "load the checkpoint that was tuned"
            )
        leaves[path] = jnp.asarray(from_torch(path, cast(np.ndarray, tensor)), dtype)
    return dataclasses.replace(bundle, params=unflatten(leaves), config=config)


def save_delta(delta: Delta, file: str | Path) -> None:
    """Writes a delta file: the same bytes for the same delta, and under its name only when it is whole."""
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.array(tensor, np.float32, order="C") for name, tensor in delta.tensors.items()}
    metadata = {"mode": delta.mode, "step": str(int(delta.step)), "base": delta.base}
    if _EMBEDDINGS in tensors:
        metadata[OVERWRITE] = str(delta.overwrite_first_layer).lower()
    write_atomically(target, to_safetensors(tensors, metadata))


def check_delta_file(file: str | Path) -> None:
    """Refuses a path where there is no file.

    Raises:
        InputError: that.
    """
    if not Path(file).is_file():
        raise InputError(f"{printable(file)}: no such file, expected a tuning's safetensors file: check the path")


def load_delta(file: str | Path) -> Delta:
    """Reads a delta file; `apply_delta` checks whether it fits.

    Raises:
        InputError: not a whole delta file, or a value is not finite.
    """
    check_delta_file(file)
    path = Path(file)
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    metadata = read_metadata(path)
    if missing := [name for name in ("mode", "step", "base") if name not in metadata]:
        raise InputError(f"{file}: no {missing[0]} in its metadata, expected the file that tuning writes")
    if not metadata["step"].isdecimal():
        raise InputError(f"{file}: step is {metadata['step']!r}, expected a whole number: the file is damaged")
    return Delta(
        tensors={name: np.asarray(tensor.read(), np.float32) for name, tensor in tensors.items()},
        step=int(metadata["step"]),
        mode=metadata["mode"],
        base=metadata["base"],
        overwrite_first_layer=metadata.get(OVERWRITE) == "true",
    )


def _name(path: tuple[str, ...]) -> str:
    return f"{path[0]}.{torch_name(path[1:])}"


def tuned_config(config: Config, delta: Delta) -> Config:
    """The configuration of a checkpoint with the delta's deep prompts or layer.

    Raises:
        InputError: the file is damaged.
    """
    if not delta.tensors.keys() & {_EMBEDDINGS, _INVERSE}:
        return config
    side = config.vision_side
    if _EMBEDDINGS in delta.tensors:
        shape = delta.tensors[_EMBEDDINGS].shape
        if len(shape) != 3:
            raise InputError(f"the tuning's {_EMBEDDINGS} has shape {shape}, expected three axes: the file is damaged")
        side = dataclasses.replace(side, prompts=DeepPrompts(shape[1], delta.overwrite_first_layer))
    side = dataclasses.replace(side, trained_inverse=side.trained_inverse or _INVERSE in delta.tensors)
    return dataclasses.replace(config, clip=side)


def _places(bundle: Bundle, config: Config) -> Mapping[str, tuple[tuple[str, ...], tuple[int, ...], Any]]:
    """Path, shape and dtype of every leaf that a delta may replace or add, by its name in the file."""
    leaves = {("unet", *path): leaf for path, leaf in flatten(bundle.params["unet"]).items()}
    if config.clip is not None and config.clip.prompts is not None:
        model = CLIPDeepPrompts(config.clip.vision, config.clip.prompts.length, config.compute_dtype)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))["params"]
        leaves |= flatten(shapes, ("clip", "deep_prompts"))
    if config.clip is not None and config.clip.trained_inverse:
        shape = (config.clip.projection_dim, config.text.hidden_size)
        leaves["clip", "inverse", "kernel"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return {_name(path): (path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
