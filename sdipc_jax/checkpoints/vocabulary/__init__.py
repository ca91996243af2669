"""CLIP's own vocabulary, 49,408 tokens, for checkpoints that carry none: single files."""

import gzip
import json
from pathlib import Path

_MERGES = Path(__file__).parent / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def write_vocabulary(folder: Path, pad: str) -> None:
    """Writes CLIP's tokenizer as a folder that transformers opens.

    Args:
        folder: is there, and empty.
        pad: the token that texts are filled up with: the end token, or "!" for OpenCLIP's towers.
    """
    merges = gzip.decompress(_MERGES.read_bytes()).decode()
    # Bytes that can be printed stand for themselves, the others for letters from 256 on.
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    letters += [chr(256 + number) for number in range(256 - len(letters))]
    words = ["".join(line.split(" ")) for line in merges.splitlines()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *words, START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True}
    for name, values in (
        ("vocab.json", {token: number for number, token in enumerate(tokens)}),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", special | settings),
    ):
        (folder / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
