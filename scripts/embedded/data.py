"""The corpus as the stages read it: balanced batches, captions, the tokenizer."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from embedded.training import Tree
from sdipc_jax.evaluate.corpus import Corpus

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77

# What says where something points, or is writing: such a drawing means something else in a mirror.
_ONE_WAY = re.compile(
    r"left|right|clock|thirty|arrow|button|input|keycap|letter|number|symbol|sign|mark|hand|facing|east|west"
    r"|calendar|alphabet|flag|moon|quarter|ON!|hundred|ABC|book|chart|newspaper|abacus|music|note|score|zodiac|[A-Z]{2}"
)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Pictures with what the losses need to know of them.

    Attributes:
        plain, styled: token ids of `{caption}` and `{caption}, {style} style`, (N, L).
        label, style: whole numbers that are equal where caption or style are.
        families: for each base concept, rows by caption.
    """

    pixels: np.ndarray
    may_flip: np.ndarray
    label: np.ndarray
    style: np.ndarray
    plain: np.ndarray
    styled: np.ndarray
    families: list[list[np.ndarray]]
    weights: np.ndarray

    def rows(self, rng: np.random.Generator, count: int) -> Int[np.ndarray, " count"]:
        """Rows drawn in pairs of a family: two drawings of one thing, or two tones of a person.

        A family's weight grows with the square root of its size, so that people, who come in six tones, do not
        crowd out everything else.
        """
        chosen = []
        for family in rng.choice(len(self.families), (count + 1) // 2, p=self.weights):
            captions = self.families[family]
            if len(captions) > 1 and rng.random() < 0.5:
                pair = rng.choice(len(captions), 2, replace=False)
                chosen += [rng.choice(captions[index]) for index in pair]
            else:
                same = captions[rng.integers(len(captions))]
                chosen += list(rng.choice(same, 2, replace=len(same) < 2))
        return np.array(chosen[:count])


def examples(corpus: Corpus, tokenizer: Path | None) -> Examples:
    """Prepares a corpus; without token ids if there is no tokenizer."""
    captions, label = np.unique(corpus.caption, return_inverse=True)
    _, style = np.unique(corpus.style, return_inverse=True)
    may_flip = np.array([_ONE_WAY.search(caption) is None for caption in captions])[label]
    plain = styled = np.zeros((len(corpus), 0), np.int32)
    if tokenizer is not None:
        plain = tokenize(tokenizer, captions.tolist())[label]
        styled = tokenize(tokenizer, [styled_caption(*pair) for pair in zip(corpus.caption, corpus.style, strict=True)])
    families = []
    _, base = np.unique(corpus.base, return_inverse=True)
    order = np.argsort(base, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(base[order])) + 1):
        families.append([rows[label[rows] == one] for one in np.unique(label[rows])])
    sizes = np.sqrt([sum(len(rows) for rows in family) for family in families])
    return Examples(corpus.pictures, may_flip, label, style, plain, styled, families, sizes / sizes.sum())


def styled_caption(caption: str, style: str) -> str:
    """The caption that names the style."""
    return f"{caption}, {style} style"


def train_tokenizer(captions: Sequence[str], folder: Path, vocabulary: int) -> None:
    """Trains CLIP's byte-pair encoding on captions, and writes a folder that transformers' CLIPTokenizer opens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: every byte, every byte at the end of a word, the merges, the two special tokens.
    names = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    settings = special | {"model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tokenize(folder: Path, texts: Sequence[str]) -> Int[np.ndarray, "N L"]:
    """Ids between start and end, then end to the full length."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    return np.array(found, np.int32)


def end_places(tokens: Int[np.ndarray, "N L"]) -> Int[np.ndarray, " N"]:
    """Where the first end token is; it has the largest id."""
    return np.argmax(tokens, axis=1)


def clip_batch(data: Examples, rng: np.random.Generator, count: int, length: int) -> Tree:
    """Pictures with a caption each, half of them with the style's name, cut to `length` tokens."""
    rows = data.rows(rng, count)
    styled = rng.random(count) < 0.5
    tokens = np.where(styled[:, None], data.styled[rows], data.plain[rows])
    end = end_places(tokens)
    fits = end < length
    tokens = tokens[:, :length]
    # The few that are longer lose words, not their end.
    tokens[~fits, -1] = data.plain[0, -1]
    return {
        "pixels": data.pixels[rows],
        "may_flip": data.may_flip[rows],
        "tokens": tokens,
        "end": np.where(fits, end, length - 1).astype(np.int32),
        "label": data.label[rows],
        "style": data.style[rows],
        "styled": styled,
    }
