"""How people write prompts for other programs: weights in brackets, and words that are embeddings.

The syntax is that of AUTOMATIC1111's web UI: `(word)` is 1.1 times as strong, `[word]` as much weaker, `(word:1.3)` as
strong as it says. Brackets in brackets multiply, `\\(` is a bracket that is read, and one that is never closed acts to
the end.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sdipc_jax.checkpoints.bundle import Embedding
from sdipc_jax.errors import InputError

_STRONGER, _WEAKER = 1.1, 1 / 1.1
_PARTS = re.compile(r"\\[\\()\[\]]|[(\[\])]|:\s*([+-]?[0-9.]+)\s*\)|[^\\()\[\]:]+|[\\:]")


class Part(NamedTuple):
    """A stretch of text that has one weight, or an embedding's word."""

    text: str
    weight: float = 1.0
    embedding: Embedding | None = None


def parts_of(text: str, embeddings: Sequence[Embedding], *, weighted: bool) -> list[Part]:
    """A text as it is tokenized: cut at weights and at embeddings.

    Args:
        weighted: whether brackets are weights; otherwise they are read.

    Raises:
        InputError: a weight that is no number.
    """
    parts = parse_weights(text) if weighted else [(text, 1.0)]
    return [Part(each, weight, embedding) for text, weight in parts for each, embedding in _split(text, embeddings)]


def parse_weights(text: str) -> list[tuple[str, float]]:
    """The stretches of a text and their weights.

    >>> parse_weights("a (red:1.5) ball")
    [('a ', 1.0), ('red', 1.5), (' ball', 1.0)]
    """
    found: list[list] = []
    round_ones: list[int] = []
    square_ones: list[int] = []

    def multiply(first: int, factor: float) -> None:
        for each in found[first:]:
            each[1] *= factor

    for match in _PARTS.finditer(text):
        piece, weight = match[0], match[1]
        if piece == "(":
            round_ones.append(len(found))
        elif piece == "[":
            square_ones.append(len(found))
        elif weight is not None and round_ones:
            multiply(round_ones.pop(), _number(weight))
        elif piece == ")" and round_ones:
            multiply(round_ones.pop(), _STRONGER)
        elif piece == "]" and square_ones:
            multiply(square_ones.pop(), _WEAKER)
        else:
            found.append([piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0])
    for first in round_ones:
        multiply(first, _STRONGER)
    for first in square_ones:
        multiply(first, _WEAKER)
    # Neighbours of one weight are one text: tokens may reach across.
    merged: list[list] = []
    for piece, weight in found:
        if merged and merged[-1][1] == weight:
            merged[-1][0] += piece
        else:
            merged.append([piece, weight])
    return [(piece, weight) for piece, weight in merged] or [("", 1.0)]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise InputError(f"the prompt has the weight {text!r}, expected a number, such as (word:1.3): correct it")
    return value


def _split(text: str, embeddings: Sequence[Embedding]) -> Iterator[tuple[str, Embedding | None]]:
    """The text around the words that are embeddings, whatever their case, and those words."""
    if not embeddings:
        yield text, None
        return
    by_word = {each.word.lower(): each for each in embeddings}
    words = "|".join(re.escape(word) for word in sorted(by_word, key=len, reverse=True))
    for place, piece in enumerate(re.split(rf"(?<!\w)({words})(?!\w)", text, flags=re.IGNORECASE)):
        if place % 2:
            yield piece, by_word[piece.lower()]
        elif piece:
            yield piece, None
