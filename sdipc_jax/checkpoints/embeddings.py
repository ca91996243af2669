"""Textual inversion: words that a file adds to a checkpoint (Gal et al. 2022).

The vocabulary stays as it is: the words' vectors are rows of a table beside it, which the text encoders read for ids
from the vocabulary's end on. One word may be several vectors.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sdipc_jax.checkpoints.bundle import Bundle, Config, Embedding, Params
from sdipc_jax.checkpoints.headers import Tensor, read_header
from sdipc_jax.checkpoints.lora_changes import shown_name
from sdipc_jax.checkpoints.tensors import refuse_pickle
from sdipc_jax.errors import InputError, printable

# The keys of files for two text encoders, by component; else a file has one tensor, under any name.
_KEYS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
# What a vector's width says of the checkpoint that a file was made for.
_BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's second text encoder"}


def with_embeddings(config: Config, files: Sequence[str | Path]) -> Config:
    """The configuration of a checkpoint with the words of files, each called as its file without the ending.

    Raises:
        InputError: a file cannot be read, or holds no vectors for this checkpoint's text encoders.
    """
    for file in files:
        config = dataclasses.replace(config, embeddings=(*config.embeddings, read_embedding(Path(file), config)))
    return config


def add_embedding(bundle: Bundle, file: str | Path) -> Bundle:
    """The bundle with one more word, called as the file without its ending. The old bundle stays what it was.

    Raises:
        InputError: as `with_embeddings`.
    """
    config = with_embeddings(bundle.config, [file])
    return dataclasses.replace(bundle, params=bundle.params | {"embeddings": load_rows(config)}, config=config)


def load_rows(config: Config) -> Params:
    """The vectors of all words in the order of their ids, for each text encoder."""
    return {
        component: jnp.concatenate([jnp.asarray(_vectors(each, component), shape.dtype) for each in config.embeddings])
        for component, shape in config.abstract_params()["embeddings"].items()
    }


def read_embedding(file: Path, config: Config) -> Embedding:
    """Reads a file's header and finds out which text encoder each tensor is for."""
    shown, word = printable(file), file.stem
    refuse_pickle(file)
    if not file.is_file():
        raise InputError(f"{shown}: no such file, expected an embedding in a safetensors file: check the path")
    if any(each.word.lower() == word.lower() for each in config.embeddings):
        raise InputError(f"{shown}: there is an embedding {word!r} already, expected each name once: rename the file")
    tensors = {tensor.name: tensor for tensor in read_header(file)}
    widths = {component: tower.hidden_size for component, tower in config.text_towers.items()}
    found = {}
    for name, tensor in tensors.items():
        width = tensor.shape[-1] if len(tensor.shape) in (1, 2) else 0
        component = _KEYS.get(name) or next((part for part, each in widths.items() if each == width), None)
        if component is None or widths.get(component) != width or component in found:
            base = f", as for {_BASES[width]}" if width in _BASES else ""
            raise InputError(
                f"{shown}: {shown_name(name)} is {list(tensor.shape)}{base}, expected one tensor (vectors, width) for "
                f"each text encoder of this checkpoint, of width {' and '.join(map(str, widths.values()))}: use a file "
                "that was made for it"
            )
        found[component] = tensor
    counts = {_count(tensor) for tensor in found.values()}
    most = config.tokens.length - 2
    if found.keys() != widths.keys() or len(counts) > 1 or not 1 <= max(counts) <= most:
        parts = ", ".join(f"{_count(tensor)} vectors for {component}" for component, tensor in found.items())
        raise InputError(
            f"{shown}: found {parts or 'no vectors'}, expected 1 to {most}, as many for each of "
            f"{' and '.join(widths)}: use another file"
        )
    return Embedding(word, str(file), max(counts), tuple((part, tensor.name) for part, tensor in found.items()))


def _count(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _vectors(embedding: Embedding, component: str) -> np.ndarray:
    name = dict(embedding.tensors)[component]
    tensor = next(each for each in read_header(Path(embedding.file)) if each.name == name)
    return tensor.read().reshape(embedding.vectors, -1)
