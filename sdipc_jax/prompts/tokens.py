"""Texts to token ids, with the checkpoint's tokenizer."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from sdipc_jax.checkpoints.bundle import Bundle, Config, SpecialTokens
from sdipc_jax.checkpoints.tokenizer import load_tokenizer
from sdipc_jax.errors import InputError
from sdipc_jax.prompts.wording import Part, parts_of

# A chunk more is a longer prompt, and so a program more.
_MOST_CHUNKS = 8


class Texts(NamedTuple):
    """Texts as `text_prompt` and `edit_prompt` take them.

    Attributes:
        tokens: ids, of one or several chunks of L; for SDXL a row for each of its two towers.
        weights: of each token's states; None if all are 1.
    """

    tokens: Int32[np.ndarray, "*N C*L"]
    weights: Float32[np.ndarray, "*N C*L"] | None = None


def tokenize(bundle: Bundle, texts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "N *towers L"]:
    """Token ids, framed by start and end and padded as the checkpoint pads; for SDXL a row for each of its two towers,
    which pad in different ways.

    Args:
        texts: prompts.
        truncate: cut what is too long instead of refusing it.

    Raises:
        InputError: a prompt is too long; the message names the word where it would be cut.
    """
    return token_ids(bundle.config, texts, truncate=truncate)


def token_ids(config: Config, texts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "N *towers L"]:
    """`tokenize` without the weights."""
    return read_texts(config, texts, truncate=truncate).tokens


def read_texts(
    config: Config,
    texts: Sequence[str],
    *,
    truncate: bool = False,
    prompt_weights: bool = False,
    long_text: str | None = None,
) -> Texts:
    """Texts with weights in brackets, or longer than the text encoder reads at once.

    Args:
        texts: prompts.
        truncate: cut what is too long instead of refusing it.
        prompt_weights: read `(word:1.3)`, `(word)` and `[word]` as weights of what is in brackets.
        long_text: `chunk` reads what is too long in chunks of L - 2 tokens, each framed on its own. Texts with fewer
            chunks than others get empty ones.

    Raises:
        InputError: a prompt is too long, or a weight is no number.
    """
    if isinstance(texts, str):
        raise InputError(f"texts is the string {texts!r}, expected a list: put it in brackets")
    options = {"truncate": truncate, "weighted": prompt_weights, "chunked": long_text is not None}
    # Each tower's own: a word that pads, such as "!", is cut from its neighbours in texts too.
    towers = [(special, [_read(config, name, text, **options) for text in texts]) for name, special in _towers(config)]
    most = max((len(row) for _, rows in towers for row in rows), default=1)
    shape = len(texts), most * config.tokens.length
    framed = [
        np.array([[_frame(special, chunk) for chunk in row + [[]] * (most - len(row))] for row in rows], np.float64)
        for special, rows in towers
    ]
    ids, weights = np.moveaxis(_side_by_side([each.reshape(*shape, 2) for each in framed]), -1, 0)
    return Texts(ids.astype(np.int32), weights.astype(np.float32) if prompt_weights else None)


def empty_tokens(config: Config) -> Int32[np.ndarray, "1 *towers L"]:
    """The empty text's ids."""
    rows = [np.array([_frame(special, [])])[..., 0] for _, special in _towers(config)]
    return _side_by_side(rows).astype(np.int32)


def _towers(config: Config) -> Iterator[tuple[str, SpecialTokens]]:
    """Each text tower's tokenizer and what frames its texts."""
    return zip(("tokenizer", "tokenizer_2"), (special for _, special in config.towers), strict=False)


def _side_by_side(towers: list[np.ndarray]) -> np.ndarray:
    return towers[0] if len(towers) == 1 else np.stack(towers, axis=1)


def with_chunks(config: Config, texts: Texts, length: int) -> Texts:
    """The texts with empty chunks behind them, up to so many tokens."""
    missing = (length - texts.tokens.shape[-1]) // config.tokens.length
    if missing <= 0:
        return texts
    chunks = [np.array([_frame(special, [])] * missing).reshape(1, -1, 2) for _, special in _towers(config)]
    ids, weights = np.moveaxis(_side_by_side(chunks)[0], -1, 0)
    rows = texts.tokens.shape[:-1]

    def longer(array: np.ndarray, more: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.broadcast_to(more.astype(array.dtype), (*rows, more.size))], axis=-1)

    return Texts(longer(texts.tokens, ids), None if texts.weights is None else longer(texts.weights, weights))


class Group(NamedTuple):
    """Tokens of a prompt that are told as one.

    Attributes:
        name: `start`, `end`, `picture` or a word.
        places: of them in the prompt.
        is_word: whether it is a word of the text.
    """

    name: str
    places: tuple[int, ...]
    is_word: bool = False


def groups_of(config: Config, tokens: Int32[np.ndarray, "*towers CL"], rest: str = "end") -> list[Group]:
    """A text's tokens: start, each word, and its end with what comes after; of SDXL's those of its first tower.

    Args:
        rest: what the end is called, where a picture's vector stands.
    """
    ids = np.asarray(tokens).reshape(-1, np.shape(tokens)[-1])[0]
    tokenizer, special = load_tokenizer(config.folder), config.tokens
    starts: list[int] = []
    words: list[Group] = []
    ends: list[int] = []
    for first in range(0, len(ids), special.length):
        chunk = ids[first : first + special.length].tolist()
        end = chunk.index(special.end, 1)
        starts.append(first)
        words += [Group(_written(config, tokenizer, chunk[place]), (first + place,), True) for place in range(1, end)]
        ends += range(first + end, first + special.length)
    return [Group("start", tuple(starts)), *words, Group(rest, tuple(ends))]


def _written(config: Config, tokenizer: Any, token: int) -> str:
    # The ids of added words come after all others.
    added = [each.word for each in config.embeddings for _ in range(each.vectors)]
    place = token - config.text.vocab_size
    return added[place] if place >= 0 else tokenizer.decode([token]).strip()


# An id and the weight of its states.
_Token = tuple[int, float]


def _read(config: Config, name: str, text: str, *, truncate: bool, weighted: bool, chunked: bool) -> list[list[_Token]]:
    """A text's chunks without their frames, of which all but one need `chunked`."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"the prompt is {text!a}, expected text that can be written as UTF-8: retype it")
    tokenizer, room = load_tokenizer(config.folder, name), config.tokens.length - 2
    groups = [
        (part, place, group)
        for part in parts_of(text, config.embeddings, weighted=weighted)
        for place, group in enumerate(_groups(config, tokenizer, part))
    ]
    chunks: list[list[_Token]] = [[]]
    for part, place, group in groups:
        if len(chunks[-1]) + len(group) > room:
            if truncate:
                break
            if not chunked:
                count = sum(len(each) for _, _, each in groups)
                raise InputError(
                    f"the prompt has {count} tokens, expected at most {room}: it would be cut at "
                    f"{_word_at(tokenizer, part, place)!r}; shorten it, or ask for it to be cut (truncate) or read in "
                    "chunks (long_text chunk)"
                )
            chunks.append([])
        chunks[-1] += group
    if len(chunks) > _MOST_CHUNKS:
        raise InputError(f"the prompt has {len(chunks)} chunks, expected at most {_MOST_CHUNKS}: shorten it")
    return chunks


def _groups(config: Config, tokenizer: Any, part: Part) -> Iterator[list[_Token]]:
    """A part's tokens, those of an embedding together: they are one word and not divided."""
    if part.embedding is None:
        for each in tokenizer(part.text, verbose=False)["input_ids"][1:-1]:
            yield [(each, part.weight)]
        return
    before = config.embeddings[: config.embeddings.index(part.embedding)]
    first = config.text.vocab_size + sum(each.vectors for each in before)
    yield [(first + place, part.weight) for place in range(part.embedding.vectors)]


def _frame(special: SpecialTokens, chunk: list[_Token]) -> list[_Token]:
    framed = [(special.start, 1.0), *chunk, (special.end, 1.0)]
    return framed + [(special.pad, 1.0)] * (special.length - len(framed))


def _word_at(tokenizer: Any, part: Part, place: int) -> str:
    """The whole word that a part's token belongs to: a word's last token ends in `</w>`."""
    if part.embedding is not None:
        return part.text
    ids = tokenizer(part.text, verbose=False)["input_ids"]
    place += 1  # Behind the start token, which counts as an end of a word, so that the search stops there.
    ends = [token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
    first = max((i for i in range(1, place) if ends[i]), default=0) + 1
    last = next((i for i in range(place, len(ids) - 1) if ends[i]), len(ids) - 2)
    return tokenizer.decode(ids[first : last + 1]).strip()
