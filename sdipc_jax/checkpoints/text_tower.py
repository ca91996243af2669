"""The text tower of the CLIP that sees pictures, which is read only where a converter is fitted to captions."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from sdipc_jax.checkpoints.bundle import Config, Params
from sdipc_jax.checkpoints.checks import check_projection
from sdipc_jax.checkpoints.dummies import check_last_layer
from sdipc_jax.checkpoints.keys import flatten
from sdipc_jax.checkpoints.load import read_tokens
from sdipc_jax.checkpoints.tensors import load_tree
from sdipc_jax.errors import InputError, printable
from sdipc_jax.models import CLIPTextModel

_UNUSED = ("vision_model.", "visual_projection.", "logit_scale")


@dataclass(frozen=True)
class TextTower:
    """A CLIP's text tower with its projection, float32, and the tokenizer that it reads texts with.

    Attributes:
        config: the checkpoint's, with this tower and tokenizer in the place of its own: what texts are read with.
        projection: W_t, (D_text, D_joint).
    """

    config: Config
    params: Params
    projection: Float32[np.ndarray, "D_text D_joint"]

    @property
    def model(self) -> CLIPTextModel:
        return CLIPTextModel(self.config.text)


def load_text_tower(config: Config) -> TextTower:
    """Reads the CLIP's text tower.

    Its tokenizer is that of its own folder. A CLIP that brings none, as `clip/` in a checkpoint's folder, reads with
    the checkpoint's.

    Raises:
        InputError: there is no CLIP, no whole text tower in its folder or no tokenizer for it, or it holds dummies.
    """
    folder, text = Path(config.vision_side.folder), config.clip_text
    own = any((place / "vocab.json").is_file() for place in (folder, folder / "tokenizer"))
    if not own and text.vocab_size != config.text.vocab_size:
        raise InputError(
            f"{printable(folder)}: found no vocab.json and merges.txt, expected those of the CLIP's tokenizer, since "
            "its vocabulary is not the checkpoint's: fetch them too"
        )
    tokenizer = str(folder) if own else config.folder
    joint = config.vision_side.projection_dim
    shapes = jax.eval_shape(CLIPTextModel(text).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    kernel = jax.ShapeDtypeStruct((text.hidden_size, joint), jnp.float32)
    expected = shapes["params"] | {"text_projection": {"kernel": kernel}}
    params = load_tree(folder, "clip", expected, unused_prefixes=_UNUSED)
    projection = np.asarray(params.pop("text_projection")["kernel"])
    check_projection(projection, printable(folder))
    layers = params["text_model"]["encoder"]["layers"]
    if len(layers) > 1:
        last, before = (flatten(layers[str(len(layers) - back)]) for back in (1, 2))
        check_last_layer(((last[path], before[path]) for path in last), len(layers) - 1, printable(folder))
    tokens = read_tokens(Path(tokenizer), text)
    own_alone: dict[str, Any] = {"text_2": None, "tokens_2": None, "embeddings": (), "clip_skip": 0}
    reading = dataclasses.replace(config, folder=tokenizer, text=text, tokens=tokens, **own_alone)
    return TextTower(reading, params, projection)
