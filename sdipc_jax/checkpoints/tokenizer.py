"""A checkpoint's tokenizer, which splits as transformers' CLIP tokenizer does, and the tokens that frame texts."""

import functools
import os
from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints.bpe import is_plain, read_plain
from sdipc_jax.checkpoints.bundle import SpecialTokens
from sdipc_jax.errors import InputError
from sdipc_jax.models import CLIPTextConfig


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: str, name: str = "tokenizer") -> Any:
    """The tokenizer of a checkpoint's folder, or of a CLIP's, which has it among its own files; kept, since it takes a
    while to load.

    Raises:
        InputError: there is no CLIP tokenizer.
    """
    path, own = Path(folder, name), Path(folder)
    if not path.is_dir() and (own / "vocab.json").is_file():
        path = own
    if not ((path / "vocab.json").is_file() and (path / "merges.txt").is_file()):
        raise InputError(f"{path}: expected a CLIP tokenizer with vocab.json and merges.txt")
    if is_plain(path):
        return read_plain(path)
    # It says at every import that PyTorch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Slow to import, and only needed where words were added.
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(path, local_files_only=True)


def special_tokens(folder: Path, text: CLIPTextConfig, name: str = "tokenizer") -> SpecialTokens:
    """The ids of start, end and pad as the tokenizer has them, and L."""
    tokenizer = load_tokenizer(str(folder), name)
    length = min(tokenizer.model_max_length, text.max_position_embeddings)
    tokens = SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, length)
    if len(tokenizer) > text.vocab_size or None in (tokens.start, tokens.end, tokens.pad):
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the text encoder {text.vocab_size}, "
            "expected the tokenizer that the text encoder was trained with"
        )
    return tokens
