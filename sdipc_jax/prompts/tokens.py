"""Texts to token ids, with the checkpoint's tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.tokenizer import load_tokenizer
from sdipc_jax.errors import InputError


def tokenize(bundle: Bundle, texts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "N L"]:
    """Token ids, framed by start and end and padded as the checkpoint pads.

    Args:
        texts: prompts.
        truncate: cut what is too long instead of refusing it.

    Raises:
        InputError: a prompt is too long; the message names the word where it would be cut.
    """
    return token_ids(bundle.config, texts, truncate=truncate)


def token_ids(config: Config, texts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "N L"]:
    """`tokenize` without the weights."""
    if isinstance(texts, str):
        raise InputError(f"texts is the string {texts!r}, expected a list: put it in brackets")
    tokenizer, special = load_tokenizer(config.folder), config.tokens
    rows = np.full((len(texts), special.length), special.pad, np.int32)
    for row, text in zip(rows, texts, strict=True):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"the prompt is {text!a}, expected text that can be written as UTF-8: retype it")
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if len(ids) > special.length:
            if not truncate:
                raise InputError(
                    f"the prompt has {len(ids) - 2} tokens, expected at most {special.length - 2}: it would be cut "
                    f"at {_word_at(tokenizer, ids, special.length - 1)!r}; shorten it or pass --truncate"
                )
            ids = [*ids[: special.length - 1], special.end]
        row[: len(ids)] = ids
    return rows


def _word_at(tokenizer: Any, ids: list[int], place: int) -> str:
    """The whole word that a token is part of: a word's last token ends in `</w>`."""
    ends = [token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
    # The start token counts as an end of a word, so that the search stops there.
    first = max((i for i in range(1, place) if ends[i]), default=0) + 1
    last = next((i for i in range(place, len(ids) - 1) if ends[i]), len(ids) - 2)
    return tokenizer.decode(ids[first : last + 1]).strip()
