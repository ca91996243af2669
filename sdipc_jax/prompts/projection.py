"""The paper's eq. 6: a picture's CLIP features become the text state that Stable Diffusion reads, in closed form.

With f_img the class token, W_i and W_t the two projections of CLIP and s the scale, in this package's row-vector form:

    v = f_img W_i                                 a point in the joint space
    h = v W_t^+                                   singular values below the cut-off count as 0 in the inverse
    f = s h / |h|     mode "tspace"               the authors' code: length s in the space of text states
    f = s h / |v|     mode "cspace"               as eq. 6 is written: length ratio in the joint space

Ding et al., "The CLIP Model is Secretly an Image-to-Prompt Converter", NeurIPS 2023, arXiv 2305.12716.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.errors import InputError
from sdipc_jax.executables import kept_program
from sdipc_jax.models.layers import precision
from sdipc_jax.prompts.captions import CAPTIONS
from sdipc_jax.prompts.contexts import end_positions, plain, text_prompt, without_skip
from sdipc_jax.prompts.prompt import Prompt, context_of
from sdipc_jax.prompts.tokens import tokenize

Mode = Literal["tspace", "cspace"]
# What stands after a picture's end token: its vector repeated, or each place's own.
AfterEnd = Literal["repeat", "own"]
Matrix = Float[Array | np.ndarray, "_ _"]

_OPENAI_L14_SCALE = 27.5
# Singular values below this share of the largest are what float32 makes of 0: their inverse would be noise, enlarged.
_ROUNDING = 1e-6


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["visual", "inverse", "scale", "singular_values", "rank", "centre", "intercept"],
    meta_fields=["mode", "widths", "joint_last"],
)
@dataclass(frozen=True)
class Projection:
    """The converter: eq. 6, or with a centre the map that `prompts.calibration` fits.

    Attributes:
        visual: W_i, (D_image, D_joint).
        inverse: the truncated W_t^+, (D_joint, D_text); a fitted map, which may be one for each place of a prompt but
            the first, (L - 1, D_joint, D_text).
        scale: the length given to every vector in mode `tspace`; in a fitted one, of each part and place.
        singular_values: all of W_t's, largest first; of a fitted one, how much captions vary along their axes.
        rank: how many of them are kept.
        centre: taken from joint vectors of unit length, (D_joint,). None: they stay as they are.
        intercept: added to the states, (D_text,), one for each place if the maps are. None: nothing is.
        mode: which length convention, see the module.
        widths: of the parts of a vector that have a length each; none: it is one.
        joint_last: the last part is the picture's own vector in the joint space, as it is: SDXL's pooled vector, where
            the CLIP is the one of its second tower (ReVision).
    """

    visual: Float[Array, "D_image D_joint"]
    inverse: Float[Array, "*places D_joint D_text"]
    scale: Float[Array, "..."]
    singular_values: Float[Array, " K"]
    rank: Array
    centre: Float[Array, " D_joint"] | None = None
    intercept: Float[Array, "*places D_text"] | None = None
    mode: Mode = "tspace"
    widths: tuple[int, ...] = ()
    joint_last: bool = False


def truncated_pinv(matrix: Matrix, cutoff: Any) -> Matrix:
    """The pseudo-inverse with singular values below an absolute cut-off left out (a value equal to it is kept).

    In float64 on the host, or in jnp where the matrix or the cut-off is traced.

    Args:
        matrix: (M, N).
        cutoff: 0 or more. Singular values within float32's rounding of 0 are left out in any case.

    Returns:
        (N, M).

    Raises:
        InputError: the cut-off is negative, not finite, or above the largest singular value, or the matrix is 0 (on
            the host only).

    >>> truncated_pinv(np.diag([4.0, 0.5]), 1.0).tolist()
    [[0.25, 0.0], [0.0, 0.0]]
    """
    return _truncated_pinv(matrix, cutoff)[0]


def closed_form(
    bundle: Bundle,
    cutoff: float | None = None,
    scale: Any = None,
    mode: Mode = "tspace",
    *,
    keep_fraction: float | None = None,
) -> Projection:
    """The converter of a checkpoint.

    Args:
        cutoff: absolute, for singular values of W_t; the checkpoint's default if None.
        scale: the length of a text state; if None the checkpoint's default, else 27.5 for OpenAI's ViT-L/14, else
            the mean norm of the end token's state over built-in captions.
        mode: `tspace` (the authors' code) or `cspace` (eq. 6 as written).
        keep_fraction: keep this share of the singular values instead of a cut-off, in (0, 1].

    Raises:
        InputError: the checkpoint cannot take pictures as prompts, or a value is out of range.
    """
    config = bundle.config
    config.check_inverse()
    if mode not in ("tspace", "cspace"):
        raise InputError(f"mode is {mode!r}, expected 'tspace' or 'cspace'")
    if scale is None:
        scale = default_scale(config)
    if scale is None:
        scale = mean_end_norm(bundle)
    elif not isinstance(scale, jax.Array) and not 0 < scale < np.inf:
        raise InputError(f"scale is {scale}, expected a positive number: leave it out to take the checkpoint's own")
    cutoff = config.defaults.cutoff if cutoff is None else cutoff
    clip = bundle.params["clip"]
    inverse, values, rank = _truncated_pinv(clip["text_projection"]["kernel"], cutoff, keep_fraction)
    if config.vision_side.trained_inverse:
        inverse = clip["inverse"]["kernel"]
    # Rounded and placed without a program, which would have to be compiled: on the host there is no need for one.
    return Projection(
        visual=clip["visual_projection"]["kernel"],
        inverse=jax.device_put(inverse.astype(np.float32)),
        scale=jnp.asarray(scale, jnp.float32),
        singular_values=jax.device_put(values.astype(np.float32)),
        rank=jax.device_put(rank.astype(np.int32)),
        mode=mode,
    )


@kept_program()
def convert(projection: Projection, features: Float[Array, "N D_image"]) -> Float[Array, "N *places D_text"]:
    """Image features to text states, by eq. 6 or by a fitted map; one for each place of a prompt if the map is.

    Raises:
        InputError: the first argument is no projection.
    """
    if not isinstance(projection, Projection):
        raise InputError("projection is none, expected what `closed_form` or `calibrate` gives: give it first")
    exact = precision(jnp.float32)
    own = joint = jnp.matmul(features.astype(jnp.float32), projection.visual, precision=exact)
    if projection.centre is not None:
        joint = joint / jnp.linalg.norm(joint, axis=-1, keepdims=True) - projection.centre
    if projection.inverse.ndim == 2:
        states = jnp.matmul(joint, projection.inverse, precision=exact)
    else:
        states = jnp.einsum("nj,pjd->npd", joint, projection.inverse, precision=exact)
    if projection.intercept is not None:
        states = states + projection.intercept
    measured = states if projection.mode == "tspace" else joint
    vectors = projection.scale * states / _lengths(measured, projection.widths)
    if not projection.joint_last:
        return vectors
    own = own.reshape(len(own), *(1,) * (vectors.ndim - 2), -1)
    fitted = vectors[..., : -own.shape[-1]]
    return jnp.concatenate([fitted, jnp.broadcast_to(own, (*fitted.shape[:-1], own.shape[-1]))], axis=-1)


def at_length(projection: Projection, vectors: Float[Array, "N *places D_text"]) -> Float[Array, "N *places D_text"]:
    """The same directions, as long as `convert` makes vectors; SDXL's pooled one stays, if it is the picture's own."""
    scaled = projection.scale * vectors / _lengths(vectors, projection.widths)
    if not projection.joint_last:
        return scaled
    last = projection.widths[-1]
    return jnp.concatenate([scaled[..., :-last], vectors[..., -last:]], axis=-1)


def in_parts(
    projection: Projection, function: Callable[..., Array], *vectors: Float[Array, "_ *places D_text"]
) -> Float[Array, "_ *places D_text"]:
    """A function of rows (N, D) for each part that has a length of its own, and for each place."""
    over_places = jax.vmap(function, in_axes=1, out_axes=1) if vectors[0].ndim == 3 else function
    parts = zip(*(jnp.split(each, np.cumsum(projection.widths[:-1]), axis=-1) for each in vectors), strict=True)
    found = [over_places(*part) for part in parts] if projection.widths else [over_places(*vectors)]
    return jnp.concatenate(found, axis=-1)


def _lengths(states: Float[Array, "*N D"], widths: tuple[int, ...]) -> Float[Array, "*N _"]:
    """The norm of each state, or at each of its numbers that of the part in which it stands."""
    if not widths:
        return jnp.linalg.norm(states, axis=-1, keepdims=True)
    parts = jnp.split(states, np.cumsum(widths[:-1]), axis=-1)
    norms = [jnp.linalg.norm(part, axis=-1, keepdims=True) for part in parts]
    return jnp.concatenate([jnp.broadcast_to(norm, part.shape) for norm, part in zip(norms, parts, strict=True)], -1)


def default_scale(config: Config) -> float | None:
    """The checkpoint's scale, or None where it has to be measured."""
    text, side = config.text, config.vision_side
    shape = (text.num_hidden_layers, text.hidden_size, text.vocab_size, side.projection_dim)
    if config.defaults.scale is None and shape == (12, 768, 49408, 768):
        return _OPENAI_L14_SCALE
    return config.defaults.scale


def end_states(
    bundle: Bundle, tokens: Int[Array | np.ndarray, "N *towers L"], after_end: AfterEnd = "repeat"
) -> Float[Array, "N *places D_text"]:
    """The state of each text's end token, of both towers and with the pooled vector in SDXL: where a picture's vector
    lies too.

    Args:
        after_end: `own` gives each place's state after the first, where those before a text's end count as its end.
    """
    config, length = bundle.config, tokens.shape[-1]
    prompt = text_prompt(without_skip(bundle), tokens)
    parts = jnp.split(context_of(prompt), np.cumsum([tower.hidden_size for tower, _ in config.towers])[:-1], axis=-1)
    read = []
    for tower, part in enumerate(parts):
        end = end_positions(tokens.reshape(len(tokens), -1, length)[:, tower], config.towers[tower][1].end)[:, None]
        places = end if after_end == "repeat" else jnp.maximum(jnp.arange(1, length), end)
        read.append(jnp.take_along_axis(part, places[..., None], axis=1))
    if isinstance(prompt, Prompt):
        pooled = prompt.pooled[:, None]
        read.append(jnp.broadcast_to(pooled, (*read[0].shape[:2], pooled.shape[-1])))
    states = jnp.concatenate(read, axis=-1)
    return states[:, 0] if after_end == "repeat" else states


def mean_end_norm(bundle: Bundle) -> Float[Array, ""]:
    """The mean norm of the end token's state over built-in captions: what a text state's length is here."""
    return jnp.mean(jnp.linalg.norm(_built_in(bundle), axis=-1))


def mean_end_state(bundle: Bundle, after_end: AfterEnd = "repeat") -> Float[Array, "1 *places D_text"]:
    """The mean of the end token's state over built-in captions: what all texts share."""
    return jnp.mean(_built_in(bundle, after_end), axis=0, keepdims=True)


def _built_in(bundle: Bundle, after_end: AfterEnd = "repeat") -> Float[Array, "N *places D_text"]:
    bundle = plain(bundle)
    return end_states(bundle, tokenize(bundle, CAPTIONS, truncate=True), after_end)


@lru_cache(maxsize=1)
def _svd_on_host(matrix: bytes, shape: tuple[int, int]) -> Any:
    """Of float64. A command asks twice for that of one matrix: to refuse it before weights are read, and to use it."""
    return np.linalg.svd(np.frombuffer(matrix).reshape(shape), full_matrices=False)


def _truncated_pinv(
    matrix: Matrix, cutoff: Any, keep_fraction: float | None = None
) -> tuple[Matrix, Float[Array | np.ndarray, " K"], Any]:
    """The inverse, all singular values, and how many are kept."""
    on_host = not any(isinstance(value, jax.core.Tracer) for value in (matrix, cutoff))
    xp: Any = np if on_host else jnp
    exact = np.asarray(matrix, np.float64) if on_host else jnp.asarray(matrix, jnp.float32)
    u, values, vt = _svd_on_host(exact.tobytes(), exact.shape) if on_host else xp.linalg.svd(exact, full_matrices=False)
    if keep_fraction is not None:
        if not 0 < keep_fraction <= 1:
            raise InputError(f"keep-fraction is {keep_fraction}, expected more than 0 and at most 1")
        cutoff = values[max(1, round(keep_fraction * len(values))) - 1]
    elif on_host and not 0 <= cutoff <= values[0]:
        raise InputError(
            f"cutoff is {cutoff}, expected 0 to {values[0]:.6g}, the largest singular value of the text projection"
        )
    if on_host and not values[0] > 0:
        raise InputError(
            "the text projection is 0 everywhere, expected at least one singular value above 0: "
            "use the CLIP that this checkpoint was trained with"
        )
    kept = (values >= cutoff) & (values > _ROUNDING * values[0])
    reciprocal = xp.where(kept, 1 / xp.where(kept, values, 1), 0)
    options = {} if on_host else {"precision": precision(jnp.float32)}
    return xp.matmul(vt.T * reciprocal, u.T, **options), values, kept.sum()
