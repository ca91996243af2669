"""Pictures and captions as training reads them, computed once."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8
from PIL import Image, ImageOps

from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.errors import InputError
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.prompts.contexts import text_prompt
from sdipc_jax.prompts.prompt import AnyPrompt
from sdipc_jax.prompts.tokens import tokenize
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.sampling.start import posterior
from sdipc_jax.tuning.losses import Batch
from sdipc_jax.tuning.settings import TuningSettings


@dataclass(frozen=True)
class Cache:
    """One row a picture, on the host. Fields are named as in a `Batch`; what the settings do not need is None."""

    latents: Float32[np.ndarray, "N h w C"]
    deviation: Float32[np.ndarray, "N h w C"]
    pixels: Float32[np.ndarray, "N S S 3"] | None = None
    features: Float32[np.ndarray, "N D_image"] | None = None
    text: AnyPrompt | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def batch(
        self, references: Sequence[int] | Int[np.ndarray, " B"], targets: Sequence[int] | Any | None = None
    ) -> Batch:
        """The batch of these pictures.

        Args:
            references: the pictures that prompt.
            targets: what they are to bring forth, as `choose_targets` tells; the references themselves if None.
        """
        prompting = np.asarray(references)
        wanted = prompting if targets is None else np.asarray(targets)
        # The text loss is about the target: its latents under its own caption.
        rows = {"latents": wanted, "deviation": wanted, "text": wanted, "pixels": prompting, "features": prompting}
        values = {name: getattr(self, name) for name in rows}
        return cast(Batch, {name: value[rows[name]] for name, value in values.items() if value is not None})


def make_cache(
    bundle: Bundle,
    settings: TuningSettings,
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    captions: Sequence[str] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
) -> Cache:
    """Encodes pictures and captions, in batches of one shape so that each network compiles once.

    Args:
        pictures: 8-bit sRGB of any sizes, as `read_picture` gives them.
        captions: one a picture; needed where the text loss counts. Long ones are cut.
        height, width: of the targets in pixels, which are scaled to cover it and cut around their middle; the
            checkpoint's default if None.
        batch_size: how many are encoded at once.

    Raises:
        InputError: no pictures, captions are missing, or a side is no multiple of f.
    """
    config = bundle.config
    if not pictures:
        raise InputError("found no pictures, expected at least one: name them")
    if captions is None and settings.text_weight > 0:
        raise InputError(
            f"found no captions, expected one a picture because text_weight is {settings.text_weight:g}: "
            "give them, or set text_weight to 0"
        )
    if captions is not None and len(captions) != len(pictures):
        raise InputError(f"found {len(captions)} captions, expected {len(pictures)}, one a picture")
    height, width = height or config.defaults.height, width or config.defaults.width
    config.latent_shape(height, width)
    preprocessing = config.vision_side.preprocessing
    pixels = np.stack([preprocess(picture, preprocessing) for picture in pictures])
    targets = np.stack([fit(picture, height, width) for picture in pictures])
    latents, deviation = in_batches(partial(encode, bundle), targets, size=batch_size)
    features = text = None
    if not settings.trains_prompts:
        features = in_batches(partial(encode_images, bundle), pixels, size=batch_size)
    if captions is not None and settings.text_weight > 0:
        text = encode_captions(bundle, captions, batch_size)
    return Cache(latents, deviation, pixels if settings.trains_prompts else None, features, text)


def choose_targets(
    references: Sequence[int] | Int[np.ndarray, " B"], classes: Sequence[Hashable], generator: np.random.Generator
) -> Int[np.ndarray, " B"]:
    """A/B training: for each reference another picture of its class, or itself where it is the only one.

    Args:
        references: numbers of pictures.
        classes: the class of every picture.

    >>> choose_targets([0, 1, 2], ["cat", "cat", "dog"], np.random.default_rng(0)).tolist()
    [1, 0, 2]
    """
    members: dict[Hashable, list[int]] = {}
    for index, name in enumerate(classes):
        members.setdefault(name, []).append(index)

    def other(reference: int) -> int:
        others = [index for index in members[classes[reference]] if index != reference]
        return others[generator.integers(len(others))] if others else reference

    return np.array([other(int(reference)) for reference in references], np.int64)


def encode_captions(bundle: Bundle, captions: Sequence[str], batch_size: int = 4) -> AnyPrompt:
    """The prompts of captions, on the host; long ones are cut."""
    tokens = tokenize(bundle, captions, truncate=True)
    return in_batches(partial(text_prompt, bundle), tokens, size=batch_size)


@jax.jit
def encode(
    bundle: Bundle, pictures: UInt8[Array | np.ndarray, "N H W 3"]
) -> tuple[Float[Array, "N h w C"], Float[Array, "N h w C"]]:
    """Mean and standard deviation of the latents, in the UNet's scale."""
    return posterior(bundle, jnp.asarray(pictures, jnp.float32) / 127.5 - 1)


def fit(picture: UInt8[np.ndarray, "_ _ 3"], height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """A picture scaled to cover this size, up or down, and cut around its middle."""
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.BICUBIC))
