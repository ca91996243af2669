"""Names and layouts: PyTorch's on one side, the parameter tree's on the other.

The tree mirrors the checkpoint's names. Three things differ: entries of the lists below are joined to their index
(`down_blocks.0` is `down_blocks_0`), `weight` is called `kernel`, `scale` or `embedding` after what it does, and
kernels are stored inputs first (linear layers transposed, convolutions height, width, in, out).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# What tuning adds to clip/: deep prompts, whose metadata say whether they overwrite the first layer's patches, and the
# trained layer in the place of the pseudo-inverse.
DEEP_PROMPTS_FILE, INVERSE_FILE = "deep_prompts.safetensors", "inverse.safetensors"
OVERWRITE = "overwrite_first_layer"

_LISTS = """attentions blocks controlnet_down_blocks down_blocks downsamplers net resnets to_out transformer_blocks
    up_blocks upsamplers""".split()
_INDEXED = re.compile(rf"\b({'|'.join(_LISTS)})_(\d+)\b")

# What older files call the projections of the VAE's attention.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_VAE_KEY = re.compile(rf"(.*mid_block\.attentions\.0)\.({'|'.join(_OLD_VAE_ATTENTION)})\.(weight|bias)")


def torch_name(path: tuple[str, ...]) -> str:
    """The PyTorch name of a leaf.

    >>> torch_name(("down_blocks_0", "attentions_1", "transformer_blocks_0", "attn2", "to_out_0", "kernel"))
    'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.weight'
    """
    *modules, leaf = path
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return _INDEXED.sub(r"\1.\2", ".".join([*modules, leaf]))


def canonical_name(component: str, name: str) -> str | None:
    """The name that a tensor of a file has today, or None for a buffer that holds no weight."""
    if name.endswith(".position_ids") or name == "position_ids":
        return None
    if component in ("text_encoder", "text_encoder_2") and not name.startswith(("text_model.", "text_projection.")):
        # transformers 5 leaves the outer module's name away, here and below.
        return f"text_model.{name}"
    if component == "safety_checker" and re.match(r"vision_model\.(?!vision_model\.)", name):
        return f"vision_model.{name}"
    if component == "vae" and (match := _OLD_VAE_KEY.fullmatch(name)):
        return f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.{match[3]}"
    return name


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a leaf of the tree has in a PyTorch file."""
    if path[-1] == "kernel":
        return (shape[1], shape[0]) if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])
    return shape


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A PyTorch tensor in the tree's layout (a view)."""
    if path[-1] == "kernel":
        return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return array


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A leaf of the tree in PyTorch's layout (a view)."""
    if path[-1] == "kernel":
        return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return array


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a nested dict by their paths."""
    leaves: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        path = (*prefix, name)
        leaves.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return leaves


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The nested dict with the given leaves."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
    return tree
