"""CLIP's byte-pair encoding, from the files that it was published in, by the library that transformers uses for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

# The files of a tokenizer that nobody has added a word to.
_PLAIN = {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}
_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = (
    *("tokenizer_class", "model_max_length", "do_lower_case", "errors", "add_prefix_space", "name_or_path"),
    *("special_tokens_map_file", "clean_up_tokenization_spaces", "use_fast", "tokenizer_file"),
)
_ENDS_WORD = "</w>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DEFAULTS = dict(zip(_KEYS, ("<|startoftext|>", *("<|endoftext|>",) * 3), strict=True))


@dataclass(frozen=True)
class PlainTokenizer:
    """What is used of transformers' CLIPTokenizer, with the same ids, without the seconds that its import takes.

    Attributes:
        backend: takes a text to pieces.
        bos_token_id, eos_token_id, pad_token_id: what frames texts and fills them up.
        model_max_length: how many tokens the checkpoint takes, or a number beyond all.
    """

    backend: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    model_max_length: int

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int | None]]:
        """The ids of a text, framed."""
        return {"input_ids": [self.bos_token_id, *self.backend.encode(text).ids, self.eos_token_id]}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """The tokens with these ids."""
        return [self.backend.id_to_token(each) for each in ids]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """The ids of these tokens."""
        return [self.backend.token_to_id(each) for each in tokens]

    def decode(self, ids: Sequence[Any]) -> str:
        """The text of these ids."""
        return self.backend.decode(ids, skip_special_tokens=False).replace(_ENDS_WORD, " ").strip()


def is_plain(folder: Path) -> bool:
    """Whether a folder holds CLIP's words alone, as they were published, and no settings that could change any."""
    names = {path.name for path in folder.iterdir()}
    if not {"vocab.json", "merges.txt"} <= names <= _PLAIN:
        return False
    settings, special = _read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json")
    tokens = (settings | special).items()
    named = all(isinstance(value, str | dict) for key, value in tokens if key in _KEYS)
    return named and settings.keys() <= {*_KEYS, *_SETTINGS} and special.keys() <= {*_KEYS}


def read_plain(folder: Path) -> PlainTokenizer:
    """The tokenizer of such a folder."""
    settings = _read(folder / "tokenizer_config.json")
    named = _DEFAULTS | settings | _read(folder / "special_tokens_map.json")
    special = {key: _token(named[key]) for key in _KEYS}
    model = BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=special["unk_token"].content,
        end_of_word_suffix=_ENDS_WORD,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # Where a text holds one of these it stands for itself.
    backend.add_tokens(list(special.values()))
    start, end, pad = (backend.token_to_id(special[key].content) for key in ("bos_token", "eos_token", "pad_token"))
    return PlainTokenizer(backend, start, end, pad, settings.get("model_max_length") or 10**30)


def _token(value: Any) -> AddedToken:
    """A token as the files have it: its text, or its text with how it is found in others."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {key: value[key] for key in ("content", "single_word", "lstrip", "rstrip", "normalized") if key in value}
    return AddedToken(**flags, special=True)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
