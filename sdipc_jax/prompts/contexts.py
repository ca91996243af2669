"""Prompts as the UNet reads them: (N, L, D) states from text (eq. 4), from pictures (eq. 7), from both (eq. 8).

Equations are those of arXiv 2305.12716.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.errors import InputError
from sdipc_jax.tracing import under_our_rules

Tokens = Int[Array | np.ndarray, "N L"]
Weights = Float[Array | np.ndarray, "N L"]


@jax.jit
def text_prompt(bundle: Bundle, tokens: Tokens, weights: Weights | None = None) -> Float[Array, "N L D_text"]:
    """The text encoder's states after its final norm, float32; with `clip_skip` the norm of an earlier layer.

    Args:
        tokens: ids as `tokenize` gives them. Texts of several chunks are encoded chunk by chunk.
        weights: of each token's states (`read_texts`). Each chunk's states are brought back to the mean that they had,
            as AUTOMATIC1111's web UI does.
    """
    if tokens.shape[-1] > bundle.config.tokens.length:
        return _in_chunks(bundle, lambda *chunk: text_prompt(bundle, *chunk), tokens, weights)
    config, params = bundle.config, bundle.params
    options = {"rows": params["embeddings"]["text_encoder"]} if config.embeddings else {}
    if config.clip_skip:
        options["skip"] = config.clip_skip
    states = apply(config.text_model, params["text_encoder"], tokens, **options).astype(jnp.float32)
    return states if weights is None else _weighted(states, jnp.asarray(weights, jnp.float32))


def _weighted(states: Float[Array, "N L D"], weights: Float[Array, "N L"]) -> Float[Array, "N L D"]:
    scaled = states * weights[..., None]
    before, after = (jnp.mean(each, axis=(1, 2), keepdims=True) for each in (states, scaled))
    return scaled * jnp.where(after == 0, 1, before / jnp.where(after == 0, 1, after))


def _in_chunks(
    bundle: Bundle, make: Callable[..., Float[Array, "N L D"]], tokens: Tokens, weights: Weights | None
) -> Float[Array, "N L D"]:
    """Prompts of chunks, one behind the other."""
    length = bundle.config.tokens.length
    if tokens.shape[-1] % length:
        raise InputError(
            f"there are {tokens.shape[-1]} tokens, expected a multiple of {length}: read texts with `read_texts`"
        )
    places = [slice(first, first + length) for first in range(0, tokens.shape[-1], length)]
    chunks = [(tokens[..., place], None if weights is None else weights[..., place]) for place in places]
    return jnp.concatenate([make(*chunk) for chunk in chunks], axis=1)


def as_long(one: Array, other: Array, length: int) -> tuple[Array, Array]:
    """Two prompts with as many chunks of L tokens: the shorter one is repeated, which attention does not notice."""
    most = max(one.shape[-2], other.shape[-2])

    def repeated(prompt: Array) -> Array:
        count = prompt.shape[-2]
        if count == most or not count or most % count or count % length:
            return prompt
        return jnp.concatenate([prompt] * (most // count), axis=-2)

    return repeated(one), repeated(other)


def negative_prompt(bundle: Bundle, tokens: Tokens, weights: Weights | None = None) -> Float[Array, "N L D_text"]:
    """What guidance leads away from: `text_prompt` without skipped layers, as in diffusers."""
    return text_prompt(without_skip(bundle), tokens, weights)


def plain(bundle: Bundle) -> Bundle:
    """The bundle with no layers skipped and no words added: what measures the closed form."""
    config = dataclasses.replace(bundle.config, clip_skip=0, embeddings=())
    return dataclasses.replace(bundle, config=config) if config != bundle.config else bundle


def without_skip(bundle: Bundle) -> Bundle:
    """The bundle whose texts are the states of the last layer, where the closed form's vectors are."""
    if not bundle.config.clip_skip:
        return bundle
    return dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, clip_skip=0))


def empty_prompt(bundle: Bundle) -> Float[Array, "1 L D_text"]:
    """The states of the empty text: what guidance leads away from."""
    special = bundle.config.tokens
    tokens = np.full((1, special.length), special.pad, np.int32)
    tokens[0, :2] = special.start, special.end
    return negative_prompt(bundle, tokens)


def image_prompt(bundle: Bundle, vectors: Float[Array, "N *places D_text"]) -> Float[Array, "N L D_text"]:
    """Eq. 7: the start token's state, then the picture's vector at every other place.

    The copies matter: each takes part in the softmax, and together they outweigh the start token (footnote 7).

    Args:
        vectors: converted pictures, as `convert` gives them: one each, or one for each place but the first.
    """
    start = empty_prompt(bundle)[:, :1]
    count, width = vectors.shape[0], vectors.shape[-1]
    length = bundle.config.tokens.length
    return jnp.concatenate(
        [
            jnp.broadcast_to(start, (count, 1, width)),
            jnp.broadcast_to(_placed(vectors), (count, length - 1, width)),
        ],
        axis=1,
    )


@under_our_rules
def edit_prompt(
    bundle: Bundle,
    vectors: Float[Array, "#N *places D_text"],
    tokens: Int[Array | np.ndarray, "#N L"],
    alpha: Float[Array | np.ndarray, "..."] | float,
    weights: Weights | None = None,
) -> Float[Array, "N L D_text"]:
    """Eq. 8: the text's words, and from its end token on f_picture + alpha f_end, a sum that is not renormalised.

    With an empty text and alpha 0 this is `image_prompt`, bit for bit. Where a picture has a vector for each place, the
    text's state of that place is added to it.

    Args:
        vectors: converted pictures.
        tokens: ids of the texts, one a picture or one for all.
        alpha: weight of the text, one a picture or one for all.
        weights: of the words' states, see `text_prompt`. f_end has none, and is the last layer's whatever `clip_skip`
            is: it is added to f_picture, which lies there. Each chunk of a long text is an edit of its own.

    Raises:
        InputError: numbers of pictures, texts and weights that differ, or a weight on the host that is not finite.
    """
    counts = {len(vectors), len(tokens), np.size(alpha)} - {1}
    if np.ndim(alpha) > 1 or len(counts) > 1:
        raise InputError(
            f"there are {len(vectors)} pictures, {len(tokens)} texts and alpha of shape {np.shape(alpha)}, "
            "expected as many of each, or one for all"
        )
    if not isinstance(alpha, jax.Array) and not (np.abs(alpha) <= np.finfo(np.float32).max).all():
        raise InputError(f"alpha is {alpha}, expected a finite number: 0.9 is the paper's")
    if tokens.shape[-1] > bundle.config.tokens.length:
        return _in_chunks(bundle, lambda part, each: edit_prompt(bundle, vectors, part, alpha, each), tokens, weights)
    states = last = text_prompt(bundle, tokens, weights)
    if weights is not None or bundle.config.clip_skip:
        last = text_prompt(without_skip(bundle), tokens)
    end = end_positions(tokens, bundle.config.tokens.end)
    for_each_place = vectors.ndim == 3
    added = last if for_each_place else jnp.take_along_axis(last, end[:, None, None], axis=1)
    alpha = jnp.asarray(alpha, jnp.float32).reshape(-1, 1, 1)
    # The first place is the start token's, whatever stands here.
    placed = jnp.concatenate([vectors[:, :1], vectors], axis=1) if for_each_place else vectors[:, None]
    combined = placed + alpha * added
    # The causal mask makes the start token's state the same under every text; one source keeps it so to the bit.
    states = states.at[:, :1].set(empty_prompt(bundle)[:, :1])
    is_word = jnp.arange(tokens.shape[1]) < end[:, None]
    return jnp.where(is_word[..., None], states, combined)


def _placed(vectors: Float[Array, "N *places D"]) -> Float[Array, "N _ D"]:
    """One vector for all places, or as many as there are."""
    return vectors[:, None] if vectors.ndim == 2 else vectors


def end_positions(tokens: Tokens, end: int) -> Int[Array, " N"]:
    """Where each text ends: its first end token, before pads that may be end tokens too.

    >>> end_positions(np.array([[8, 5, 9, 9], [8, 9, 9, 9]]), end=9).tolist()
    [2, 1]
    """
    return jnp.argmax(jnp.asarray(tokens) == end, axis=1)
