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
        order: rows by base concept and caption.
        first_row, rows_of: of each caption in this order: where its rows begin, and how many they are.
        first_caption, captions_of: of each base concept: where its captions begin among these, and how many they are.
        weights: the chance of each base concept.
    """

    pixels: np.ndarray
    may_flip: np.ndarray
    label: np.ndarray
    style: np.ndarray
    plain: np.ndarray
    styled: np.ndarray
    order: np.ndarray
    first_row: np.ndarray
    rows_of: np.ndarray
    first_caption: np.ndarray
    captions_of: np.ndarray
    weights: np.ndarray

    def rows(self, rng: np.random.Generator, steps: int, count: int) -> Int[np.ndarray, "steps count"]:
        """Rows drawn in pairs of a base concept: two drawings of one thing, or two tones of a person.

        A concept's weight grows with the square root of its size, so that people, who come in six tones, do not
        crowd out everything else.
        """
        pairs = steps * ((count + 1) // 2)
        concept = rng.choice(len(self.weights), pairs, p=self.weights)
        captions = self.captions_of[concept]
        one, other = _two_of(rng, captions)
        other = np.where((captions > 1) & (rng.random(pairs) < 0.5), other, one)
        one, other = self.first_caption[concept] + one, self.first_caption[concept] + other
        row, another = _two_of(rng, self.rows_of[one])
        another = np.where(one == other, another, (rng.random(pairs) * self.rows_of[other]).astype(int))
        places = np.stack([self.first_row[one] + row, self.first_row[other] + another], axis=1)
        return self.order[places].reshape(steps, -1)[:, :count]


def _two_of(rng: np.random.Generator, counts: Int[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """Two different numbers below each count, or twice 0 where the count is 1."""
    one = (rng.random(len(counts)) * counts).astype(int)
    further = 1 + (rng.random(len(counts)) * (counts - 1)).astype(int)
    return one, (one + further) % counts


def examples(corpus: Corpus, tokenizer: Path | None) -> Examples:
    """Prepares a corpus; without token ids if there is no tokenizer."""
    captions, label = np.unique(corpus.caption, return_inverse=True)
    _, style = np.unique(corpus.style, return_inverse=True)
    may_flip = np.array([_ONE_WAY.search(caption) is None for caption in captions])[label]
    plain = styled = np.zeros((len(corpus), 0), np.int32)
    if tokenizer is not None:
        plain = tokenize(tokenizer, captions.tolist())[label]
        styled = tokenize(tokenizer, [styled_caption(*pair) for pair in zip(corpus.caption, corpus.style, strict=True)])
    _, base = np.unique(corpus.base, return_inverse=True)
    order = np.lexsort((label, base))
    _, first_row, rows_of = np.unique(np.stack([base, label])[:, order], axis=1, return_index=True, return_counts=True)
    _, first_caption, captions_of = np.unique(base[order[first_row]], return_index=True, return_counts=True)
    sizes = np.sqrt(np.add.reduceat(rows_of, first_caption))
    grouping = (order, first_row, rows_of, first_caption, captions_of, sizes / sizes.sum())
    return Examples(corpus.pictures, may_flip, label, style, plain, styled, *grouping)


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


def caption_tokens(data: Examples) -> Int[np.ndarray, "M L"]:
    """Token ids of each caption without a style, in the order of the labels."""
    _, first = np.unique(data.label, return_index=True)
    return data.plain[first]


def clip_batch(data: Examples, rng: np.random.Generator, steps: int, count: int) -> Tree:
    """Rows of pictures, and which of their captions name the style: half of them."""
    return {"rows": data.rows(rng, steps, count), "styled": rng.random((steps, count)) < 0.5}
