"""Fits the converter of a checkpoint to captions, where the inverse of the text projection does not reach."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.bundle import Bundle, Config, Params, apply
from sdipc_jax.checkpoints.text_tower import TextTower, load_text_tower
from sdipc_jax.errors import InputError
from sdipc_jax.models import CLIPTextModel
from sdipc_jax.prompts.contexts import end_positions, plain
from sdipc_jax.prompts.everyday import everyday_captions
from sdipc_jax.prompts.projection import AfterEnd, Projection, end_states
from sdipc_jax.prompts.ridge import RidgeMap, explained, fit, parts_of, unit
from sdipc_jax.prompts.tokens import token_ids, tokenize
from sdipc_jax.prompts.vision import encode_images, read_pictures
from sdipc_jax.records import Record, digest_of

# Fewer pictures give a mean that is mostly their own, and this many of many kinds one that serves.
FEWEST_PICTURES, ENOUGH_PICTURES = 30, 100
# Below this distance of the two means the shift gains nothing.
SMALL_GAP = 0.1
_FEWEST_CAPTIONS = 20
# Every so many captions are kept apart once, to tell how well the map does on those that it was not fitted to.
_HELD_OUT = 10
# Cosine of two text projections of one CLIP, tuned or rounded; those of two CLIPs have about 0.
_SAME = 0.9


@dataclass(frozen=True)
class Calibration:
    """A map fitted to captions, and what is known of it.

    Attributes:
        ridge: l.
        captions: how many.
        captions_sha256: which.
        r2: of captions that another fit of the same kind did not see, for each part of the end token's state.
        widths: of those parts; none if it is one.
    """

    map: RidgeMap
    ridge: float
    captions: int
    captions_sha256: str
    r2: tuple[float, ...]
    widths: tuple[int, ...] = ()

    def projection(self, bundle: Bundle, mean: Float[np.ndarray, " D_joint"] | None = None) -> Projection:
        """What `convert` takes.

        Args:
            mean: of many pictures' joint vectors, at unit length: the mean shift.
        """
        single = len(self.map.matrix) == 1
        length = np.repeat(self.map.length, self.widths, axis=1) if self.widths else self.map.length

        def placed(values: np.ndarray) -> Array:
            return jnp.asarray(values[0] if single else values, jnp.float32)

        return Projection(
            visual=bundle.params["clip"]["visual_projection"]["kernel"],
            inverse=placed(self.map.matrix),
            scale=placed(length) if self.widths or not single else jnp.asarray(length[0, 0], jnp.float32),
            singular_values=jnp.asarray(self.map.deviations, jnp.float32),
            rank=jnp.asarray(self.map.rank, jnp.int32),
            centre=jnp.asarray(self.map.centre if mean is None else mean, jnp.float32),
            intercept=placed(self.map.intercept),
            widths=self.widths,
            joint_last=_is_second_tower(bundle),
        )

    def record(self) -> Record:
        """What a manifest says of it."""
        return {
            "ridge": self.ridge,
            "captions": self.captions,
            "captions_sha256": self.captions_sha256,
            "r2": [round(each, 4) for each in self.r2],
        }


def calibrate(
    bundle: Bundle,
    captions: Sequence[str] | None = None,
    pictures: Sequence[str | Path] | Float[Array | np.ndarray, "N D_image"] | None = None,
    ridge: float | None = None,
    *,
    after_end: AfterEnd = "repeat",
) -> Projection:
    """The converter of a checkpoint, fitted to captions: for any CLIP and whatever states the UNet reads.

    The captions go through the CLIP's own text tower, which is read for this from its folder, and through the
    checkpoint's text encoder. See `prompts.ridge` for the mathematics.

    Args:
        captions: at least three a dimension of the joint space; 4,000 built-in ones of everyday things if None.
        pictures: at least 30, better 100 of many kinds: files, or features as `encode_images` gives them. Their mean
            is put onto the captions'.
        ridge: how much directions in which captions hardly vary are left out; if None 0.3 where the UNet reads the last
            layer of the CLIP's text tower, 1 elsewhere.
        after_end: what stands after the end token: its state repeated, or each place's own fitted state, which differs
            where the pad is not the end token.

    Raises:
        InputError: the CLIP has no text tower or a dummy for it, there are too few captions or pictures, or a value is
            out of range.
    """
    config = bundle.config
    fitted = fit_captions(bundle, load_text_tower(config), captions, ridge, after_end)
    return fitted.projection(bundle, None if pictures is None else mean_of_pictures(bundle, pictures))


def fit_captions(
    bundle: Bundle,
    tower: TextTower,
    captions: Sequence[str] | None = None,
    ridge: float | None = None,
    after_end: AfterEnd = "repeat",
) -> Calibration:
    """Fits the map. See `calibrate`."""
    captions = everyday_captions() if captions is None else captions
    ridge = default_ridge(bundle.config) if ridge is None else ridge
    check(bundle.config, captions, ridge, after_end)
    joint = caption_vectors(tower, captions)
    states, widths = caption_states(bundle, captions, after_end)
    held = np.arange(len(captions)) % _HELD_OUT == 0
    part = fit(joint[~held], states[~held, :1], ridge, widths)
    found, truth = (parts_of(each, widths) for each in (part(joint[held]), states[held, 0]))
    return Calibration(
        map=fit(joint, states, ridge, widths),
        ridge=ridge,
        captions=len(captions),
        captions_sha256=digest_of(list(captions)),
        r2=tuple(explained(*each) for each in zip(found, truth, strict=True)),
        widths=widths,
    )


def default_ridge(config: Config) -> float:
    """l: 0.3 where the UNet reads the last layer of the CLIP's text tower, 1 elsewhere."""
    return 0.3 if config.inverse_reaches else 1.0


def check(config: Config, captions: Sequence[str], ridge: float, after_end: str) -> None:
    """Refuses what cannot be fitted, before anything is loaded.

    Raises:
        InputError: that.
    """
    joint = config.vision_side.projection_dim
    if isinstance(captions, str):
        raise InputError(f"captions is the string {captions!r}, expected a list: put it in brackets")
    if len(captions) < _FEWEST_CAPTIONS:
        raise InputError(f"found {len(captions)} captions, expected at least {_FEWEST_CAPTIONS}: add some")
    if not 0 <= ridge < np.inf:
        raise InputError(f"ridge is {ridge}, expected 0 or more: leave it out to take the default")
    if ridge == 0 and len(captions) <= joint:
        raise InputError(
            f"found {len(captions)} captions without a ridge, expected more than the {joint} dimensions of the joint "
            "space: add some, or ask for a ridge"
        )
    if after_end not in ("repeat", "own"):
        raise InputError(f"after_end is {after_end!r}, expected 'repeat' or 'own'")


def mean_of_pictures(
    bundle: Bundle, pictures: Sequence[str | Path] | Float[Array | np.ndarray, "N D_image"]
) -> Float[np.ndarray, " D_joint"]:
    """The mean of pictures' joint vectors at unit length.

    Args:
        pictures: files, or features as `encode_images` gives them.

    Raises:
        InputError: there are fewer than 30.
    """
    if len(pictures) < FEWEST_PICTURES:
        raise InputError(
            f"found {len(pictures)} pictures for the mean shift, expected at least {FEWEST_PICTURES}, better "
            f"{ENOUGH_PICTURES} of many kinds: add some, or leave them out"
        )
    if not hasattr(pictures, "shape"):
        pixels = [encode_images(bundle, read_pictures(bundle, [path])) for path in pictures]
        pictures = np.concatenate(pixels)
    return unit(picture_vectors(bundle, np.asarray(pictures))).mean(axis=0)


def picture_vectors(bundle: Bundle, features: Float[np.ndarray, "N D_image"]) -> Float[np.ndarray, "N D_joint"]:
    """Pictures' vectors in the joint space, float64."""
    return features.astype(np.float64) @ np.asarray(bundle.params["clip"]["visual_projection"]["kernel"], np.float64)


def caption_vectors(tower: TextTower, captions: Sequence[str]) -> Float[np.ndarray, "N D_joint"]:
    """Captions' vectors in the joint space, float64."""
    tokens = token_ids(tower.config, captions, truncate=True)
    end = np.asarray(end_positions(tokens, tower.config.tokens.end))
    # Each state depends on those before it alone, so that the padding can be left away.
    tokens = tokens[:, : end.max() + 1]

    def at_end(tokens: np.ndarray, end: np.ndarray) -> Array:
        return _tower_states(tower.model, tower.params, tokens)[jnp.arange(len(end)), end]

    return in_batches(at_end, tokens, end).astype(np.float64) @ tower.projection.astype(np.float64)


def caption_states(
    bundle: Bundle, captions: Sequence[str], after_end: AfterEnd = "repeat"
) -> tuple[Float[np.ndarray, "N places D_text"], tuple[int, ...]]:
    """The states that the UNet reads of captions, and the widths of their parts if they have several.

    Returns:
        The end token's states, one place; or with `own` each place's after the first, where those that come before a
        caption's end count as its end.
    """
    bundle = plain(bundle)
    config, tokens = bundle.config, tokenize(bundle, captions, truncate=True)
    if after_end == "repeat":
        # Each state depends on those before it alone, so that the padding can be left away.
        rows = tokens.reshape(len(tokens), -1, tokens.shape[-1])
        ends = [end_positions(rows[:, n], special.end).max() for n, (_, special) in enumerate(config.towers)]
        tokens = tokens[..., : max(map(int, ends)) + 1]
    states = in_batches(partial(end_states, bundle, after_end=after_end), tokens)
    second = config.text_2
    widths = () if second is None else (config.text.hidden_size, second.hidden_size, second.projection_dim)
    return states[:, None] if after_end == "repeat" else states, widths


def _is_second_tower(bundle: Bundle) -> bool:
    """Whether the CLIP is that of SDXL's second text tower: its text projection is the same, or nearly, if tuned."""
    if not bundle.config.clip_is_second_tower:
        return False
    kernels = (bundle.params[name]["text_projection"]["kernel"] for name in ("clip", "text_encoder_2"))
    one, other = (np.asarray(kernel, np.float64).ravel() for kernel in kernels)
    return bool(one @ other > _SAME * np.linalg.norm(one) * np.linalg.norm(other))


@partial(jax.jit, static_argnums=0)
def _tower_states(model: CLIPTextModel, params: Params, tokens: Int[Array, "N L"]) -> Float[Array, "N L D"]:
    return apply(model, params, tokens)


def shifted(
    projection: Projection, pictures: Float[np.ndarray, " D_joint"], captions: Float[np.ndarray, " D_joint"]
) -> Projection:
    """Eq. 6's converter with the mean shift: pictures' mean at unit length is put onto the captions'."""
    return dataclasses.replace(projection, centre=jnp.asarray(pictures - captions, jnp.float32))
