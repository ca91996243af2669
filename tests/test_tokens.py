"""Text to token ids: frames, pads, lengths. The tokenizer of tests/tiny.py has one token a letter and 20 places."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdipc_jax import Bundle, InputError, tokenize
from sdipc_jax.checkpoints.bpe import is_plain, read_plain
from sdipc_jax.checkpoints.bundle import SpecialTokens
from sdipc_jax.checkpoints.load import EMBEDDED
from sdipc_jax.checkpoints.tokenizer import load_tokenizer, special_tokens
from tests.tiny import END, START, write_tokenizer


def letters(bundle: Bundle, text: str) -> list[int]:
    tokens = load_tokenizer(bundle.config.folder).convert_tokens_to_ids([*text[:-1], f"{text[-1]}</w>"])
    assert len(set(tokens)) == len(set(text))
    return tokens


def test_special_tokens_are_the_tokenizers(tiny: Bundle, other_pad: Bundle) -> None:
    assert tiny.config.tokens == SpecialTokens(start=512, end=513, pad=513, length=20)
    found = special_tokens(Path(other_pad.config.folder), other_pad.config.text)
    assert found == other_pad.config.tokens == SpecialTokens(start=512, end=513, pad=0, length=20)


def test_length_is_that_of_the_text_encoder_where_the_tokenizer_names_none(tiny: Bundle, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer/tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"model_max_length": 20, ', ""))
    assert special_tokens(tmp_path, dataclasses.replace(tiny.config.text, max_position_embeddings=13)).length == 13


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(tiny: Bundle, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="the tokenizer has 514 tokens and the text encoder 513, expected"):
        special_tokens(tmp_path, dataclasses.replace(tiny.config.text, vocab_size=513))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"expected a CLIP tokenizer with vocab.json and merges.txt, or tokenizer.json"
    ):
        load_tokenizer(str(tmp_path))


def test_frame_and_pads(tiny: Bundle, other_pad: Bundle) -> None:
    for bundle, pad in ((tiny, 513), (other_pad, 0)):
        found = tokenize(bundle, ["cat", "", "A  Cat\n"])
        assert found.dtype == np.int32
        cat = letters(bundle, "cat")
        assert found[0].tolist() == [512, *cat, 513, *[pad] * 15]
        assert found[1].tolist() == [512, 513, *[pad] * 18]
        assert found[2].tolist() == [512, *letters(bundle, "a"), *cat, 513, *[pad] * 14]


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("text", ["a cat", "hello! you", "ünïcode ✨", "", "x" * 18, "a " * 30])
def test_pads_as_transformers_does(tiny: Bundle, other_pad: Bundle, text: str) -> None:
    for bundle in (tiny, other_pad):
        tokenizer = transformers_tokenizer(Path(bundle.config.folder, "tokenizer"))
        expected = tokenizer(text, padding="max_length", max_length=20, truncation=True)["input_ids"]
        assert tokenize(bundle, [text], truncate=True)[0].tolist() == expected


def test_a_prompt_may_fill_every_place(tiny: Bundle) -> None:
    text = "abcdefghijklmnopqr"
    assert tokenize(tiny, [text])[0].tolist() == [512, *letters(tiny, text), 513]


@pytest.mark.parametrize(
    "text, count, word",
    [
        ("abcdefghijklmnopqrs", 19, "abcdefghijklmnopqrs"),
        ("a red elephant and a mouse", 21, "mouse"),  # cut before its third letter
        ("sixteen elephants or more", 22, "more"),  # cut before its first letter
        ("abcdefghi jklmnop ✨ and", 22, "✨"),  # cut between its bytes
    ],
)
def test_too_long_prompts_are_refused_with_the_word_that_would_be_cut(
    tiny: Bundle, text: str, count: int, word: str
) -> None:
    with pytest.raises(InputError) as refusal:
        tokenize(tiny, ["fits", text])
    assert str(refusal.value) == (
        f"the prompt has {count} tokens, expected at most 18: it would be cut at {word!r}; "
        "shorten it, or ask for it to be cut (truncate) or read in chunks (long_text chunk)"
    )


def test_truncated_prompts_end_in_the_end_token(tiny: Bundle) -> None:
    long, short = tokenize(tiny, ["abcdefghijklmnopqrs", "a"], truncate=True)
    assert long.tolist() == [512, *letters(tiny, "abcdefghijklmnopqrs")[:18], 513]
    assert short.tolist() == tokenize(tiny, ["a"])[0].tolist()


def test_text_that_is_no_text_is_refused(tiny: Bundle) -> None:
    with pytest.raises(InputError, match=r"^the prompt is 'caf\\udce9', expected text that can be written as UTF-8"):
        tokenize(tiny, ["caf\udce9"])
    with pytest.raises(InputError, match=r"^texts is the string 'a cat', expected a list"):
        tokenize(tiny, "a cat")


def test_no_texts_are_no_rows(tiny: Bundle) -> None:
    assert tokenize(tiny, []).shape == (0, 20)


def test_start_in_the_text_is_one_token(tiny: Bundle) -> None:
    assert tokenize(tiny, [f"a {START}"])[0, :4].tolist() == [512, *letters(tiny, "a"), 512, 513]


ODD = [
    *("", " ", "A  Cat\n\t", "it's we'll I'M don'T 's's", "é é a\u0301", "日本語 中文字", "नमस्ते", "123 4567 Ⅷ ½ ²"),
    *("<|endoftext|>", "a<|startoftext|>b <|EndOfText|> <|endoftext", "!", "a!b ! !!", "cat</w> </w>", "a_b-c/d"),
    *("a\u0000b\u200bc\u00a0d\ufeff", "İstanbul ß \u017f \ufb01", "👩\u200d👩\u200d👧", "\u0301", "x" * 200),
]
PARTS = [*map(chr, [*range(32, 127), *range(160, 600), *range(0x300, 0x330), *range(0x3040, 0x3060)]), *ODD]


def long_form(folder: Path) -> None:
    """The special tokens as the files of Stable Diffusion 1 have them."""
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    special = {key: token | {"content": END} for key in ("eos_token", "unk_token")} | {"pad_token": END}
    special["bos_token"] = token | {"content": START}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"model_max_length": 77, "add_prefix_space": False, "errors": "replace", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))


@pytest.mark.parametrize("kind", ["embedded", "letters", "other pad", "long form"])
def test_words_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """Ids, and what is shown of them, for odd texts and for texts drawn at random."""
    folder = EMBEDDED / "tokenizer" if kind == "embedded" else tmp_path / "tokenizer"
    if kind != "embedded":
        write_tokenizer(folder, pad="!" if kind == "other pad" else END)
    if kind == "long form":
        long_form(folder)
    assert is_plain(folder)
    found, expected = read_plain(folder), transformers_tokenizer(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length"):
        assert getattr(found, name) == getattr(expected, name)
    assert len(found) == len(expected)
    draw = random.Random(0)
    for text in [*ODD, *("".join(draw.choices(PARTS, k=draw.randrange(1, 30))) for _ in range(300))]:
        ids = found(text)["input_ids"]
        assert ids == list(expected(text, verbose=False)["input_ids"]), text
        assert found.convert_ids_to_tokens(ids) == expected.convert_ids_to_tokens(ids)
        assert found.decode(ids) == expected.decode(ids)


@pytest.mark.parametrize(
    "file, content",
    [
        ("added_tokens.json", {"<concept>": 514}),
        ("tokenizer_config.json", {"add_eos_token": False}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<concept>"]}),
        ("special_tokens_map.json", {"pad_token": None}),
    ],
)
def test_tokenizers_with_anything_added_are_left_to_transformers(tmp_path: Path, file: str, content: Any) -> None:
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    assert is_plain(folder)
    (folder / file).write_text(json.dumps(content))
    assert not is_plain(folder)
