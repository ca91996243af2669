"""Prompts as the UNet reads them: (N, L, D) states from text (eq. 4), from pictures (eq. 7), from both (eq. 8).

Equations are those of arXiv 2305.12716.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.errors import InputError
from sdipc_jax.tracing import under_our_rules

Tokens = Int[Array | np.ndarray, "N L"]


@jax.jit
def text_prompt(bundle: Bundle, tokens: Tokens) -> Float[Array, "N L D_text"]:
    """The text encoder's states after its final norm, float32.

    Args:
        tokens: ids as `tokenize` gives them.
    """
    return apply(bundle.config.text_model, bundle.params["text_encoder"], tokens).astype(jnp.float32)


def empty_prompt(bundle: Bundle) -> Float[Array, "1 L D_text"]:
    """The states of the empty text: what guidance leads away from."""
    special = bundle.config.tokens
    tokens = np.full((1, special.length), special.pad, np.int32)
    tokens[0, :2] = special.start, special.end
    return text_prompt(bundle, tokens)


def image_prompt(bundle: Bundle, vectors: Float[Array, "N D_text"]) -> Float[Array, "N L D_text"]:
    """Eq. 7: the start token's state, then the picture's vector at every other place.

    The copies matter: each takes part in the softmax, and together they outweigh the start token (footnote 7).

    Args:
        vectors: converted pictures, as `convert` gives them.
    """
    start = empty_prompt(bundle)[:, :1]
    count, width = vectors.shape
    length = bundle.config.tokens.length
    return jnp.concatenate(
        [
            jnp.broadcast_to(start, (count, 1, width)),
            jnp.broadcast_to(vectors[:, None], (count, length - 1, width)),
        ],
        axis=1,
    )


@under_our_rules
def edit_prompt(
    bundle: Bundle,
    vectors: Float[Array, "#N D_text"],
    tokens: Int[Array | np.ndarray, "#N L"],
    alpha: Float[Array | np.ndarray, "..."] | float,
) -> Float[Array, "N L D_text"]:
    """Eq. 8: the text's words, and from its end token on f_picture + alpha f_end, a sum that is not renormalised.

    With an empty text and alpha 0 this is `image_prompt`, bit for bit.

    Args:
        vectors: converted pictures.
        tokens: ids of the texts, one a picture or one for all.
        alpha: weight of the text, one a picture or one for all.

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
    states = text_prompt(bundle, tokens)
    end = end_positions(tokens, bundle.config.tokens.end)
    at_end = jnp.take_along_axis(states, end[:, None, None], axis=1)
    alpha = jnp.asarray(alpha, jnp.float32).reshape(-1, 1, 1)
    combined = vectors[:, None] + alpha * at_end
    # The causal mask makes the start token's state the same under every text; one source keeps it so to the bit.
    states = states.at[:, :1].set(empty_prompt(bundle)[:, :1])
    is_word = jnp.arange(tokens.shape[1]) < end[:, None]
    return jnp.where(is_word[..., None], states, combined)


def end_positions(tokens: Tokens, end: int) -> Int[Array, " N"]:
    """Where each text ends: its first end token, before pads that may be end tokens too.

    >>> end_positions(np.array([[8, 5, 9, 9], [8, 9, 9, 9]]), end=9).tolist()
    [2, 1]
    """
    return jnp.argmax(jnp.asarray(tokens) == end, axis=1)
