"""Parameter trees of diffusers' FlaxStableDiffusionPipeline (diffusers 0.39 was the last to have one), and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdipc_jax.checkpoints.bundle import Bundle, Params
from sdipc_jax.checkpoints.keys import flatten, unflatten
from sdipc_jax.errors import InputError

# The one place where the trees' names differ: diffusers' Flax VAE kept the names that its PyTorch twin dropped.
_FLAX_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
_OURS = {theirs: ours for ours, theirs in _FLAX_VAE_ATTENTION.items()}
_COMPONENTS = ("unet", "vae", "text_encoder", "safety_checker")


def to_flax_pipeline(bundle: Bundle) -> Params:
    """The `params` of a FlaxStableDiffusionPipeline, but for its scheduler's state."""
    params = {name: bundle.params[name] for name in _COMPONENTS if name in bundle.params}
    return params | {"vae": _rename(params["vae"], _FLAX_VAE_ATTENTION)}


def from_flax_pipeline(bundle: Bundle, params: Mapping[str, Any]) -> Bundle:
    """The bundle with the weights of a FlaxStableDiffusionPipeline; its CLIP's vision side stays.

    Args:
        bundle: says what the weights are for, such as the loaded folder that the pipeline was made from.
        params: the pipeline's `params`; a scheduler's state among them is not read.

    Raises:
        InputError: a leaf is missing, extra or misshapen.
    """
    expected = bundle.config.abstract_params()
    new = dict(bundle.params)
    for name in _COMPONENTS:
        if name not in expected:
            continue
        if name not in params:
            raise InputError(f"params has no {name}, expected the params of a FlaxStableDiffusionPipeline")
        tree = _rename(params[name], _OURS) if name == "vae" else params[name]
        new[name] = _fit(name, flatten(tree), flatten(expected[name]))
    return dataclasses.replace(bundle, params=new)


def _rename(tree: Mapping[str, Any], names: Mapping[str, str]) -> Params:
    def renamed(path: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(part, part) for part in path) if "attentions_0" in path else path

    return unflatten({renamed(path): leaf for path, leaf in flatten(tree).items()})


def _fit(
    component: str, leaves: Mapping[tuple[str, ...], Any], expected: Mapping[tuple[str, ...], jax.ShapeDtypeStruct]
) -> Params:
    for path in sorted(leaves.keys() ^ expected.keys()):
        what = "missing" if path in expected else "extra"
        raise InputError(f"{component}: {'/'.join(path)} is {what}: use the parameters of this very checkpoint")
    for path, leaf in expected.items():
        if leaves[path].shape != leaf.shape:
            raise InputError(f"{component}: {'/'.join(path)} has shape {leaves[path].shape}, expected {leaf.shape}")
    return unflatten({path: jnp.asarray(leaves[path], leaf.dtype) for path, leaf in expected.items()})
