"""A checkpoint with its converter, as settings ask for it: what takes a command's pictures to vectors."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from sdipc_jax.checkpoints.bundle import Bundle, Config, for_sampling
from sdipc_jax.checkpoints.checks import check_projection
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import load_weights
from sdipc_jax.checkpoints.tensors import load_tree
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.errors import InputError, printable
from sdipc_jax.prompts.calibration import (
    ENOUGH_PICTURES,
    SMALL_GAP,
    Calibration,
    caption_vectors,
    fit_captions,
    mean_of_pictures,
    picture_vectors,
    shifted,
)
from sdipc_jax.prompts.calibration_store import Store
from sdipc_jax.prompts.familiar import Familiar
from sdipc_jax.prompts.plan import Plan, plan_conversion
from sdipc_jax.prompts.projection import (
    Projection,
    at_length,
    closed_form,
    convert,
    default_scale,
    end_states,
    in_parts,
    mean_end_state,
    truncated_pinv,
)
from sdipc_jax.prompts.ridge import unit
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Record, digest_of
from sdipc_jax.settings import ProjectionSettings

# What the map does not follow from: parts that no text goes through.
_NO_TEXT = ("unet/", "vae/", "scheduler/", "safety_checker/", "feature_extractor/")


class Converter:
    """The checkpoint and its converter, with what the checkpoint decided.

    Attributes:
        values: what manifests say of it: the cut-off and the scale that are used, or the calibration.
        notes: what was measured, for a person.
        calibration: the map, where it was fitted to captions.
    """

    projection: Projection

    def __init__(self, config: Config, settings: ProjectionSettings) -> None:
        self.config, self.settings = config, settings
        self.plan = plan_conversion(config, settings)
        self.notes: tuple[str, ...] = ()
        self.calibration: Calibration | None = None
        if self.plan.method == "pinv":
            self._invert()
        else:
            self._fit()
        if self.plan.pictures:
            self._shift()

    def _invert(self) -> None:
        """The paper's inverse, eq. 6."""
        config, settings = self.config, self.settings
        cutoff = config.defaults.cutoff if settings.cutoff is None else settings.cutoff
        _check_projection(config, 0.0 if settings.keep_fraction else cutoff)
        self.bundle = load_weights(config, settings.tuned)
        self.projection = closed_form(
            self.bundle, cutoff, settings.scale, settings.mode, keep_fraction=settings.keep_fraction
        )
        scale = float(self.projection.scale)
        self.values: Record = {"cutoff": None if settings.keep_fraction else cutoff, "scale": scale}
        if settings.scale is None and default_scale(config) is None:
            self.notes = (f"scale {scale:.4g}, measured over built-in captions",)

    def _fit(self) -> None:
        """The map, from the cache or from captions."""
        settings, plan = self.settings, self.plan
        self.bundle, calibration, notes = fitted(self.config, plan, partial(load_weights, self.config, settings.tuned))
        self.calibration = calibration
        projection = calibration.projection(self.bundle)
        if settings.scale is not None:
            if calibration.widths:
                raise InputError("found scale for a prompt of several parts, each with its length: leave it out")
            projection = dataclasses.replace(
                projection, scale=jnp.full_like(projection.scale, settings.scale, jnp.float32)
            )
        self.projection = projection
        lengths = calibration.map.length[0].tolist()
        scale = settings.scale or (lengths if calibration.widths else lengths[0])
        self.values = {"scale": scale, "calibration": calibration.record()}
        explained = " and ".join(f"{each:.3f}" for each in calibration.r2)
        told = f"calibrated on {calibration.captions} captions with ridge {plan.ridge:g}"
        self.notes = (f"{told}: R^2 {explained} on captions that were not fitted", *notes)

    def _shift(self) -> None:
        """Puts the mean of many pictures onto the captions'."""
        captions, pictures = self.plan.captions, self.plan.pictures
        mean = mean_of_pictures(self.bundle, pictures)
        if self.calibration is None:
            centre = unit(caption_vectors(load_text_tower(self.config), captions)).mean(axis=0)
            self.projection = shifted(self.projection, mean, centre)
        else:
            centre = self.calibration.map.centre
            self.projection = dataclasses.replace(self.projection, centre=jnp.asarray(mean, jnp.float32))
        gap = float(np.linalg.norm(mean - centre))
        self.values["shift"] = {"pictures": len(pictures), "gap": gap, "mean_sha256": digest_of(mean.tobytes())}
        words = f"the means of {len(pictures)} pictures and of the captions are {gap:.3f} apart"
        words += ", so that the shift gains hardly anything" if gap < SMALL_GAP else ""
        if len(pictures) < ENOUGH_PICTURES:
            words += f"; {ENOUGH_PICTURES} pictures of many kinds would be better"
        self.notes += (words,)

    def release(self) -> Bundle:
        """What sampling reads, when all prompts are made: the towers' memory is free from here on."""
        self.bundle = for_sampling(self.bundle)
        return self.bundle

    def vectors(
        self, pictures: Sequence[Float32[np.ndarray, "S S 3"]], names: Sequence[str] = ()
    ) -> Float[Array, "N *places D_text"]:
        """The vectors of preprocessed pictures.

        Args:
            names: what they are called, where there is to be a note on those that the checkpoint does not know.
        """
        # One at a time: the same picture gives the same vector to the bit, whatever stands beside it.
        features = jnp.concatenate([encode_images(self.bundle, pixels[None]) for pixels in pictures])
        # A tuned checkpoint may know more.
        familiar = Familiar.of(self.config) if names and self.settings.tuned is None else None
        if familiar is not None:
            self.notes += familiar.notes(names, picture_vectors(self.bundle, np.asarray(features)))
        return convert(self.projection, features)

    def of_texts(self, tokens: Int[np.ndarray, "N *towers L"]) -> Float[Array, "N *places D_text"]:
        """The states of texts that lie where the pictures' vectors do."""
        return end_states(self.bundle, tokens, self.plan.after_end)

    def of_all_texts(self) -> Float[Array, "1 *places D_text"]:
        """What these states have in common."""
        return mean_end_state(self.bundle, self.plan.after_end)

    def at_length(self, vectors: Float[Array, "N *places D_text"]) -> Float[Array, "N *places D_text"]:
        """The same directions at a prompt's length."""
        return at_length(self.projection, vectors)

    def each(self, function: Callable[..., Array], *vectors: Array) -> Float[Array, "_ *places D_text"]:
        """A function of rows (N, D), for each part of the vectors and each place."""
        return in_parts(self.projection, function, *vectors)


def fitted(config: Config, plan: Plan, load: Callable[[], Bundle]) -> tuple[Bundle, Calibration, tuple[str, ...]]:
    """A checkpoint and its map, from the cache or from captions, and what there is to say of the cache.

    Args:
        load: reads the weights.
    """
    files = digests(config, None, left_out=_NO_TEXT)
    store = Store(plan.map_record() | {"dtype": config.dtype, "checkpoint": files})
    calibration = store.read()
    # Whatever is wrong with the CLIP is told before the UNet is read.
    tower = load_text_tower(config) if calibration is None else None
    bundle = load()
    if tower is not None:
        calibration = fit_captions(bundle, tower, plan.captions, plan.ridge, plan.after_end)
        store.write(calibration)
    assert calibration is not None
    return bundle, calibration, store.notes


def _check_projection(config: Config, cutoff: float) -> None:
    """Refuses a cut-off that leaves nothing, and a dummy, before gigabytes are loaded and anything is compiled."""
    shape = jax.ShapeDtypeStruct((config.clip_text.hidden_size, config.vision_side.projection_dim), jnp.float32)
    others = ("text_model.", "vision_model.", "visual_projection.", "logit_scale")
    folder = Path(config.vision_side.folder)
    tree = load_tree(folder, "clip", {"text_projection": {"kernel": shape}}, unused_prefixes=others)
    projection = np.asarray(tree["text_projection"]["kernel"])
    truncated_pinv(projection, cutoff)
    check_projection(projection, printable(folder))
