"""Prompts as the UNet reads them, from text (eq. 4), from pictures (eq. 7), from both (eq. 8).

Equations are those of arXiv 2305.12716.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdipc_jax.checkpoints.bundle import Bundle, Config, apply
from sdipc_jax.errors import InputError
from sdipc_jax.executables import kept_program
from sdipc_jax.prompts.prompt import AnyPrompt, Prompt, abstract_prompt, check_axes, context_of, with_context
from sdipc_jax.prompts.tokens import empty_tokens
from sdipc_jax.tracing import under_our_rules

# One row a text, or one for each of SDXL's two towers.
Tokens = Int[Array | np.ndarray, "N *towers L"]
Weights = Float[Array | np.ndarray, "N *towers L"]


@kept_program()
def text_prompt(bundle: Bundle, tokens: Tokens, weights: Weights | None = None) -> AnyPrompt:
    """What the UNet reads of texts, float32: the text encoder's states after its final norm, or SDXL's `Prompt`.

    With `clip_skip` the states are those of an earlier layer.

    Args:
        tokens: ids as `tokenize` gives them. Texts of several chunks are encoded chunk by chunk.
        weights: of each token's states (`read_texts`). Each chunk's states are brought back to the mean that they had,
            as AUTOMATIC1111's web UI does.
    """
    if tokens.shape[-1] > bundle.config.tokens.length:
        return _in_chunks(bundle, lambda *chunk: text_prompt(bundle, *chunk), tokens, weights)
    return _READERS[len(bundle.config.towers)](bundle, tokens, weights)


def _read_by_one(bundle: Bundle, tokens: Int[Array, "N L"], weights: Weights | None) -> Float[Array, "N L D_text"]:
    config, params = bundle.config, bundle.params
    options = {"rows": params["embeddings"]["text_encoder"]} if config.embeddings else {}
    if config.clip_skip:
        options["skip"] = config.clip_skip
    states = apply(config.text_model, params["text_encoder"], tokens, **options).astype(jnp.float32)
    return states if weights is None else _weighted(states, jnp.asarray(weights, jnp.float32))


def _read_by_two(bundle: Bundle, tokens: Int[Array, "N 2 L"], weights: Weights | None) -> Prompt:
    """Both towers' states before the last layer, without its norm; the second one's end state in the joint space."""
    config, params = bundle.config, bundle.params
    first, second = jnp.moveaxis(jnp.asarray(tokens), 1, 0)
    rows = params.get("embeddings", {})
    _, states = apply(
        config.text_model, params["text_encoder"], first, rows.get("text_encoder"), output_hidden_states=True
    )
    ends = end_positions(second, config.towers[1][1].end)
    pooled, states_2 = apply(config.text_model_2, params["text_encoder_2"], second, ends, rows.get("text_encoder_2"))
    read = [each[-2 - config.clip_skip].astype(jnp.float32) for each in (states, states_2)]
    if weights is not None:
        parts = jnp.moveaxis(jnp.asarray(weights, jnp.float32), 1, 0)
        read = [_weighted(*each) for each in zip(read, parts, strict=True)]
    return Prompt(jnp.concatenate(read, axis=-1), pooled.astype(jnp.float32))


# By the number of text towers.
_READERS: dict[int, Callable[..., Any]] = {1: _read_by_one, 2: _read_by_two}


def _weighted(states: Float[Array, "N L D"], weights: Float[Array, "N L"]) -> Float[Array, "N L D"]:
    scaled = states * weights[..., None]
    before, after = (jnp.mean(each, axis=(1, 2), keepdims=True) for each in (states, scaled))
    return scaled * jnp.where(after == 0, 1, before / jnp.where(after == 0, 1, after))


def _in_chunks(bundle: Bundle, make: Callable[..., AnyPrompt], tokens: Tokens, weights: Weights | None) -> AnyPrompt:
    """Prompts of chunks, one behind the other; the pooled vector is the first one's."""
    length = bundle.config.tokens.length
    if tokens.shape[-1] % length:
        raise InputError(
            f"there are {tokens.shape[-1]} tokens, expected a multiple of {length}: read texts with `read_texts`"
        )
    places = [slice(first, first + length) for first in range(0, tokens.shape[-1], length)]
    chunks = [(tokens[..., place], None if weights is None else weights[..., place]) for place in places]
    made = [make(*chunk) for chunk in chunks]
    return with_context(made[0], jnp.concatenate([context_of(each) for each in made], axis=1))


def as_long(one: AnyPrompt, other: AnyPrompt, length: int) -> tuple[AnyPrompt, AnyPrompt]:
    """Two prompts with as many chunks of L tokens: the shorter one is repeated, which attention does not notice."""
    most = max(context_of(each).shape[-2] for each in (one, other))

    def repeated(prompt: AnyPrompt) -> AnyPrompt:
        context = context_of(prompt)
        count = context.shape[-2]
        if count == most or not count or most % count or count % length:
            return prompt
        return with_context(prompt, jnp.concatenate([context] * (most // count), axis=-2))

    return repeated(one), repeated(other)


def negative_prompt(
    bundle: Bundle,
    tokens: Tokens | None = None,
    weights: Weights | None = None,
    given: Bool[Array | np.ndarray, " N"] | None = None,
) -> AnyPrompt:
    """What guidance leads away from: `text_prompt` without skipped layers, as in diffusers.

    Args:
        tokens: of texts, also of the empty one. None, where nothing is said, is the empty text too, but zeros for a
            checkpoint that wants it so (`force_zeros_for_empty_prompt`), as in diffusers.
        weights: see `text_prompt`.
        given: which of the texts count; zeros stand in the place of the others.
    """
    if tokens is None and bundle.config.force_zeros_for_empty_prompt:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_prompt(bundle.config, 1))
    encoded = text_prompt(without_skip(bundle), empty_tokens(bundle.config) if tokens is None else tokens, weights)
    if given is None:
        return encoded
    return jax.tree.map(lambda leaf: jnp.where(given.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0), encoded)


def plain(bundle: Bundle) -> Bundle:
    """The bundle with no layers skipped and no words added: what measures the closed form."""
    config = dataclasses.replace(bundle.config, clip_skip=0, embeddings=())
    return dataclasses.replace(bundle, config=config) if config != bundle.config else bundle


def without_skip(bundle: Bundle) -> Bundle:
    """The bundle whose texts are the states of the last layer, where the closed form's vectors are."""
    if not bundle.config.clip_skip:
        return bundle
    return dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, clip_skip=0))


def empty_prompt(bundle: Bundle) -> AnyPrompt:
    """The states of the empty text."""
    return negative_prompt(bundle, empty_tokens(bundle.config))


def image_prompt(bundle: Bundle, vectors: Float[Array, "N *places D"]) -> AnyPrompt:
    """Eq. 7: the start token's state, then the picture's vector at every other place.

    The copies matter: each takes part in the softmax, and together they outweigh the start token (footnote 7).

    Args:
        vectors: converted pictures, as `convert` gives them: one each, or one for each place but the first. SDXL's have
            the pooled vector at their end.

    Raises:
        InputError: something else than that.
    """
    check_axes("vectors", vectors, ("N", "D"), most=3)
    return after_start(bundle.config, context_of(empty_prompt(bundle))[:, :1], vectors)


def after_start(config: Config, start: Float[Array, "1 1 D_text"], vectors: Float[Array, "N *places D"]) -> AnyPrompt:
    """`image_prompt` with the start token's state given."""
    states, pooled = _parts_of(config, vectors)
    count, width = states.shape[0], states.shape[-1]
    length = config.tokens.length
    context = jnp.concatenate(
        [
            jnp.broadcast_to(start, (count, 1, width)),
            jnp.broadcast_to(_placed(states), (count, length - 1, width)),
        ],
        axis=1,
    )
    return context if pooled is None else Prompt(context, pooled)


def _parts_of(config: Config, vectors: Float[Array, "N *places D"]) -> tuple[Float[Array, "N *places D_text"], Any]:
    """What cross-attention reads of converted pictures, and SDXL's pooled vector, (N, P)."""
    if config.text_2 is None:
        return vectors, None
    width = config.unet.cross_attention_dim
    pooled = vectors if vectors.ndim == 2 else vectors[:, 0]
    return vectors[..., :width], pooled[:, width:]


@under_our_rules
def edit_prompt(
    bundle: Bundle,
    vectors: Float[Array, "#N *places D"],
    tokens: Int[Array | np.ndarray, "#N *towers L"],
    alpha: Float[Array | np.ndarray, "..."] | float,
    weights: Weights | None = None,
) -> AnyPrompt:
    """Eq. 8: the text's words, and from its end token on f_picture + alpha f_end, a sum that is not renormalised.

    SDXL's pooled vector is the same sum. With an empty text and alpha 0 this is `image_prompt`, bit for bit. Where a
    picture has a vector for each place, the text's state of that place is added to it.

    Args:
        vectors: converted pictures.
        tokens: ids of the texts, one a picture or one for all.
        alpha: weight of the text, one a picture or one for all.
        weights: of the words' states, see `text_prompt`. f_end has none, and is the last layer's whatever `clip_skip`
            is: it is added to f_picture, which lies there. Each chunk of a long text is an edit of its own.

    Raises:
        InputError: numbers of pictures, texts and weights that differ, or a weight on the host that is not finite.
    """
    check_axes("vectors", vectors, ("N", "D"), most=3)
    check_axes("tokens", tokens, ("N", "L"), most=3)
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
    config = bundle.config
    text = last = text_prompt(bundle, tokens, weights)
    if weights is not None or config.clip_skip:
        last = text_prompt(without_skip(bundle), tokens)
    picture, pooled = _parts_of(config, vectors)
    if pooled is None:
        return _edited(bundle, text, last, picture, end_positions(tokens, config.tokens.end), alpha)
    middle = config.text.hidden_size
    halves = []
    for tower, part in enumerate((slice(None, middle), slice(middle, None))):
        # Each tower has its own words and its own end.
        end = end_positions(tokens[:, tower], config.towers[tower][1].end)
        states = text.context[..., part], last.context[..., part], picture[..., part]
        halves.append(_edited(bundle, *states, end, alpha, part))
    strength = jnp.asarray(alpha, jnp.float32).reshape(-1, 1)
    return Prompt(jnp.concatenate(halves, axis=-1), pooled + strength * text.pooled)


def _edited(
    bundle: Bundle,
    states: Float[Array, "#N L D"],
    last: Float[Array, "#N L D"],
    picture: Float[Array, "#N *places D"],
    end: Int[Array, "#N"],
    alpha: Any,
    part: slice = slice(None),
) -> Float[Array, "N L D"]:
    """Eq. 8 for the states of one tower, which are this part of all.

    Args:
        last: the states that f_end is among.
    """
    for_each_place = picture.ndim == 3
    added = last if for_each_place else jnp.take_along_axis(last, end[:, None, None], axis=1)
    alpha = jnp.asarray(alpha, jnp.float32).reshape(-1, 1, 1)
    # The first place is the start token's, whatever stands here.
    placed = jnp.concatenate([picture[:, :1], picture], axis=1) if for_each_place else picture[:, None]
    combined = placed + alpha * added
    # The causal mask makes the start token's state the same under every text; one source keeps it so to the bit.
    states = states.at[:, :1].set(context_of(empty_prompt(bundle))[:, :1, part])
    is_word = jnp.arange(states.shape[1]) < end[:, None]
    return jnp.where(is_word[..., None], states, combined)


def _placed(vectors: Float[Array, "N *places D"]) -> Float[Array, "N _ D"]:
    """One vector for all places, or as many as there are."""
    return vectors[:, None] if vectors.ndim == 2 else vectors


def end_positions(tokens: Int[Array | np.ndarray, "N L"], end: int) -> Int[Array, " N"]:
    """Where each text ends: its first end token, before pads that may be end tokens too.

    >>> end_positions(np.array([[8, 5, 9, 9], [8, 9, 9, 9]]), end=9).tolist()
    [2, 1]
    """
    return jnp.argmax(jnp.asarray(tokens) == end, axis=1)
