"""What some programs write where they have no weights: a projection and a last layer that stand for nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sdipc_jax.checkpoints.checks import check_projection
from sdipc_jax.checkpoints.single import SingleFile, open_single
from sdipc_jax.errors import InputError

_LAYER = tuple(
    f"{module}.{leaf}"
    for module in (
        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    )
    for leaf in ("bias", "weight")
)


def check_last_layer(pairs: Iterable[tuple[Any, Any]], layer: int, name: str) -> None:
    """Refuses a last layer that is a copy of the one before, as where a tower has one layer less than CLIP's.

    Args:
        pairs: each array of the last layer with that of the one before; they are looked at until two differ.
        layer: the number of the last one.

    Raises:
        InputError: it is one.
    """
    if all(np.array_equal(last, before) for last, before in pairs):
        raise InputError(
            f"{name}: found a dummy for layer {layer}, a copy of the one before, expected CLIP's: "
            "use the files of the CLIP itself"
        )


def check_second_tower(file: Path, layers: int) -> None:
    """Refuses dummies in a single file's second text encoder, whose last layer and projection make SDXL's pooled text.

    Of a first text encoder neither is read.

    Raises:
        InputError: there is one.
    """
    single = open_single(file)
    check_projection(_values(single, "text_projection.weight"), single.name)
    if layers > 1:
        last, before = (f"text_model.encoder.layers.{layers - back}" for back in (1, 2))
        pairs = ((_values(single, f"{last}.{name}"), _values(single, f"{before}.{name}")) for name in _LAYER)
        check_last_layer(pairs, layers - 1, single.name)


def _values(single: SingleFile, name: str) -> np.ndarray:
    part = "text_encoder_2"
    single.side(part, name, 0)
    return single.read(part, {name: single.shape(part, name) or ()})[name].read().astype(np.float32)
