"""A checkpoint's tokenizer, which splits as transformers' CLIP tokenizer does, and the tokens that frame texts."""

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints.bpe import is_plain, read_plain
from sdipc_jax.checkpoints.bundle import Config, SpecialTokens
from sdipc_jax.checkpoints.families import OPEN_CLIP_PAD
from sdipc_jax.checkpoints.headers import check_pointer
from sdipc_jax.checkpoints.shapes import family_of
from sdipc_jax.checkpoints.single import open_single
from sdipc_jax.checkpoints.vocabulary import write_vocabulary
from sdipc_jax.errors import InputError
from sdipc_jax.models import CLIPTextConfig


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: str, name: str = "tokenizer") -> Any:
    """The tokenizer of a checkpoint's folder; kept, since it takes a while to load.

    A CLIP's folder has it among its own files, and a single file reads with CLIP's own.

    Raises:
        InputError: there is no CLIP tokenizer.
    """
    if Path(folder).is_file():
        with tempfile.TemporaryDirectory() as temporary:
            _write_own(Path(folder), Path(temporary), name)
            return _open(Path(temporary))
    path, own = Path(folder, name), Path(folder)
    among = not path.is_dir() and any((own / file).is_file() for file in ("vocab.json", "tokenizer.json"))
    return _open(own if among else path)


def _write_own(single: Path, folder: Path, name: str) -> None:
    """CLIP's own tokenizer, for single files. SDXL's second tower is OpenCLIP's, and pads as that does."""
    pad = OPEN_CLIP_PAD if name == "tokenizer_2" else family_of(open_single(single)).pad
    write_vocabulary(folder, pad)


def _open(path: Path) -> Any:
    words = all((path / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not words and not (path / "tokenizer.json").is_file():
        raise InputError(f"{path}: expected a CLIP tokenizer with vocab.json and merges.txt, or tokenizer.json")
    for file in path.glob("*.json"):
        check_pointer(file)
    if words and is_plain(path):
        return read_plain(path)
    # It says at every import that PyTorch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Slow to import, and only needed where words were added.
    import transformers

    # transformers 5 has one class of both names and writes tokenizer.json alone, which the slow one of 4 does not read.
    kind = getattr(transformers, "CLIPTokenizer" if words else "CLIPTokenizerFast")
    return kind.from_pretrained(path, local_files_only=True)


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


def write_tokenizer(config: Config, folder: Path) -> None:
    """Writes a checkpoint's tokenizer of the folder's name, to a new folder."""
    source = Path(config.folder)
    if source.is_file():
        folder.mkdir()
        _write_own(source, folder, folder.name)
    else:
        shutil.copytree(source / folder.name, folder)
