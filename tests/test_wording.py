"""Weights in brackets, texts in chunks, skipped layers and embeddings: each against arrays computed by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sdipc_jax as sdipc
from sdipc_jax import Bundle, InputError
from sdipc_jax.batch.items import Item, Reader
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.checkpoints.bundle import apply
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.embeddings import read_embedding, with_embeddings
from sdipc_jax.checkpoints.load import configure, load_weights
from sdipc_jax.prompts.contexts import as_long, negative_prompt
from sdipc_jax.prompts.tokens import Texts, read_texts, with_chunks
from sdipc_jax.prompts.wording import parse_weights
from sdipc_jax.sampling.request import begin
from sdipc_jax.settings import CheckpointSettings, SamplerSettings

# Weights. The table is how AUTOMATIC1111's web UI documents its own syntax.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("[less] (x:0.5)", [("less", 1 / 1.1), (" ", 1.0), ("x", 0.5)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2.0)]),
        ("a: b) ]", [("a: b) ]", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("", [("", 1.0)]),
    ],
)
def test_brackets_are_weights(text: str, expected: list[tuple[str, float]]) -> None:
    found = parse_weights(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in expected])


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"the weight '1.2.3', expected a number, such as \(word:1.3\)"):
        parse_weights("a (b:1.2.3)")


def test_weighted_states_have_the_mean_that_they_had(tiny: Bundle) -> None:
    texts = read_texts(tiny.config, ["a (bc:1.5) d", "x"], prompt_weights=True)
    assert texts.weights is not None
    assert texts.weights[0].tolist() == [1.0, 1.0, 1.5, 1.5, *[1.0] * 16]
    assert texts.weights[1].tolist() == [1.0] * 20
    plain = sdipc.tokenize(tiny, ["a bc d", "x"])
    np.testing.assert_array_equal(texts.tokens, plain)
    states = np.asarray(sdipc.text_prompt(tiny, plain), np.float64)
    scaled = states * texts.weights[..., None]
    expected = scaled * states.mean(axis=(1, 2), keepdims=True) / scaled.mean(axis=(1, 2), keepdims=True)
    found = sdipc.text_prompt(tiny, *texts)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Weights of 1 change nothing, and a text does not depend on those beside it.
    np.testing.assert_array_equal(found[1], sdipc.text_prompt(tiny, plain)[1])


def test_brackets_are_read_where_weights_are_off(tiny: Bundle) -> None:
    texts = read_texts(tiny.config, ["(a:1.5)"])
    assert texts.weights is None
    np.testing.assert_array_equal(texts.tokens, sdipc.tokenize(tiny, ["(a:1.5)"]))
    assert (texts.tokens[0] != tiny.config.tokens.end).sum() == 8


# Chunks. The tiny tokenizer has one token a letter, and a chunk room for 18.


def test_long_texts_are_chunks_of_their_own(tiny: Bundle) -> None:
    long, short = "abcdefghijklmnopqrstuvwxyz", "ab"
    texts = read_texts(tiny.config, [long, short], long_text="chunk")
    assert texts.tokens.shape == (2, 40)
    start, end = tiny.config.tokens.start, tiny.config.tokens.end
    whole = sdipc.tokenize(tiny, ["abcdefghijklmnopqr"])[0]
    ids = [*whole[1:18], *sdipc.tokenize(tiny, ["stuvwxyz"])[0]]
    assert texts.tokens[0, 1:18].tolist() == ids[:17]
    assert texts.tokens[0, [0, 19, 20]].tolist() == [start, end, start]
    assert texts.tokens[0, 21:30].tolist() == [*sdipc.tokenize(tiny, ["stuvwxyz"])[0, 1:9], end]
    np.testing.assert_array_equal(texts.tokens[1, 20:], sdipc.tokenize(tiny, [""])[0])
    found = sdipc.text_prompt(tiny, texts.tokens)
    expected = [sdipc.text_prompt(tiny, texts.tokens[:, place]) for place in (slice(0, 20), slice(20, 40))]
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=1e-5)


def test_edits_of_long_texts_are_edits_of_their_chunks(tiny: Bundle) -> None:
    texts = read_texts(tiny.config, ["abcdefghijklmnopqrstuvwxyz"], long_text="chunk")
    vectors = jnp.asarray(np.random.default_rng(0).standard_normal((1, 24)), jnp.float32)
    found = sdipc.edit_prompt(tiny, vectors, texts.tokens, 0.5)
    for place in (slice(0, 20), slice(20, 40)):
        expected = sdipc.edit_prompt(tiny, vectors, texts.tokens[:, place], 0.5)
        np.testing.assert_allclose(found[:, place], expected, atol=1e-5)


def test_empty_chunks_are_filled_in(tiny: Bundle) -> None:
    texts = read_texts(tiny.config, ["(ab:2)"], prompt_weights=True)
    longer = with_chunks(tiny.config, texts, 60)
    assert longer.weights is not None
    assert longer.weights.shape == (1, 60)
    np.testing.assert_array_equal(longer.tokens[0, 20:40], sdipc.tokenize(tiny, [""])[0])
    assert (longer.weights[0, 20:] == 1).all()
    assert with_chunks(tiny.config, texts, 20) is texts


def test_attention_does_not_notice_that_a_shorter_prompt_is_repeated(tiny: Bundle) -> None:
    """What is done where a picture's prompt meets a long negative one."""
    rng = np.random.default_rng(1)
    short, long = (jnp.asarray(rng.standard_normal((1, count, 24)), jnp.float32) for count in (20, 40))
    one, other = as_long(short, long, 20)
    np.testing.assert_array_equal(one, np.concatenate([short, short], axis=1))
    np.testing.assert_array_equal(other, long)
    sample, time = jnp.asarray(rng.standard_normal((1, 8, 8, 4)), jnp.float32), jnp.full(1, 5.0)
    unet = jax.jit(lambda prompt: apply(tiny.config.unet_model, tiny.params["unet"], sample, time, prompt))
    np.testing.assert_allclose(unet(short), unet(one), atol=1e-5)


def test_requests_take_prompts_of_several_chunks(tiny: Bundle) -> None:
    long = jnp.ones((2, 40, 24))
    request, _ = begin(tiny, long, seeds=0, steps=2)
    assert request.context.shape == (4, 40, 24)
    request, _ = begin(tiny, long[:, :20], negative=long[:1], seeds=0, steps=2)
    assert request.context.shape == (4, 40, 24)
    for length in (30, 60):
        with pytest.raises(InputError, match="has shape"):
            begin(tiny, long, negative=jnp.ones((1, length, 24)), seeds=0, steps=2)


def test_too_many_chunks_are_refused(tiny: Bundle) -> None:
    with pytest.raises(InputError, match="the prompt has 9 chunks, expected at most 8: shorten it"):
        read_texts(tiny.config, ["x" * 145], long_text="chunk")
    with pytest.raises(InputError, match="found both truncate and long_text, expected one of them"):
        SamplerSettings(truncate=True, long_text="chunk")


# Skipped layers.


def test_clip_skip_is_the_norm_of_an_earlier_layer(tiny: Bundle) -> None:
    """The layer's states come from a tower that has no later layers."""
    skipping = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, clip_skip=1))
    shorter = dataclasses.replace(tiny.config, text=dataclasses.replace(tiny.config.text, num_hidden_layers=1))
    reference = dataclasses.replace(tiny, config=shorter)
    tokens = sdipc.tokenize(tiny, ["a cat", ""])
    found, last = sdipc.text_prompt(skipping, tokens), sdipc.text_prompt(tiny, tokens)
    np.testing.assert_allclose(found, sdipc.text_prompt(reference, tokens), atol=1e-6)
    assert np.abs(found - last).max() > 0.1
    # What guidance leads away from, the prompts of pictures and f_end of eq. 8 stay what they are.
    np.testing.assert_array_equal(negative_prompt(skipping, tokens), last)
    np.testing.assert_array_equal(sdipc.empty_prompt(skipping), sdipc.empty_prompt(tiny))
    vectors = jnp.ones((2, 24))
    np.testing.assert_array_equal(sdipc.image_prompt(skipping, vectors), sdipc.image_prompt(tiny, vectors))
    edited, plain = (sdipc.edit_prompt(each, vectors, tokens, 0.5) for each in (skipping, tiny))
    np.testing.assert_allclose(edited[0, 1:5], found[0, 1:5], atol=1e-6)
    np.testing.assert_allclose(edited[:, 6:], plain[:, 6:], atol=1e-6)


def test_a_layer_has_to_be_left(tiny_folder: Path) -> None:
    assert configure(CheckpointSettings(model=str(tiny_folder), clip_skip=1)).clip_skip == 1
    with pytest.raises(InputError, match="clip_skip is 2, expected less than the text encoder's 2 layers"):
        configure(CheckpointSettings(model=str(tiny_folder), clip_skip=2))


# Embeddings.


def embedding(folder: Path, name: str, **tensors: np.ndarray) -> str:
    save_file(tensors, folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


def vectors(count: int, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, count]).standard_normal((count, width)).astype(np.float32)


def test_words_are_rows_beside_the_vocabulary(tiny: Bundle, tmp_path: Path) -> None:
    """As if the vocabulary had been longer by so many rows."""
    one, three = vectors(1)[0], vectors(3)
    bundle = sdipc.add_embedding(tiny, embedding(tmp_path, "Cat-toy", **{"<cat-toy>": one}))
    bundle = sdipc.add_embedding(bundle, embedding(tmp_path, "bad", emb_params=three))
    assert tiny.config.embeddings == ()
    tokens = sdipc.tokenize(bundle, ["a cat-toy, b", "bad! badly"])
    comma = sdipc.tokenize(tiny, [","])[0, 1]
    assert tokens[0, 2:4].tolist() == [514, comma]
    assert tokens[1, 1:4].tolist() == [515, 516, 517]
    assert (tokens[1, 4:] < 514).all()  # A part of a word is no word.
    table = np.asarray(tiny.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"])
    longer = jax.tree.map(lambda leaf: leaf, tiny.params)
    longer["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"] = jnp.asarray(
        np.concatenate([table, one[None], three])
    )
    config = dataclasses.replace(tiny.config, text=dataclasses.replace(tiny.config.text, vocab_size=518))
    expected = sdipc.text_prompt(Bundle(longer, config), tokens)
    np.testing.assert_allclose(sdipc.text_prompt(bundle, tokens), expected, atol=1e-6)
    # The end token is found by its id, although words have larger ones.
    edited = sdipc.edit_prompt(bundle, jnp.zeros((2, 24)), tokens, 1.0)
    end = tokens[0].tolist().index(tiny.config.tokens.end)
    np.testing.assert_allclose(edited[0, end], expected[0, end], atol=1e-5)


def test_embeddings_are_loaded_and_recorded(tiny: Bundle, tiny_folder: Path, tmp_path: Path) -> None:
    file = embedding(tmp_path, "word", emb_params=vectors(2))
    config = configure(CheckpointSettings(model=str(tiny_folder), embedding=file, dtype="bfloat16"))
    bundle = load_weights(config)
    (rows,) = jax.tree.leaves(bundle.params["embeddings"])
    np.testing.assert_array_equal(rows, jnp.asarray(vectors(2), jnp.bfloat16))
    assert digests(config, None).keys() - digests(tiny.config, None).keys() == {"embedding/word"}


def test_an_embedding_is_not_divided(tiny: Bundle, tmp_path: Path) -> None:
    bundle = sdipc.add_embedding(tiny, embedding(tmp_path, "word", emb_params=vectors(4)))
    text = "x" * 16 + " word y"
    with pytest.raises(InputError, match="the prompt has 21 tokens, expected at most 18: it would be cut at 'word'"):
        sdipc.tokenize(bundle, [text])
    texts = read_texts(bundle.config, [text], long_text="chunk")
    assert texts.tokens[0, 17:26].tolist() == [*[513] * 3, 512, 514, 515, 516, 517, sdipc.tokenize(tiny, ["y"])[0, 1]]
    assert (sdipc.tokenize(bundle, [text], truncate=True)[0] < 514).all()


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"clip_l": vectors(2), "clip_g": vectors(2, 1280)}, "clip_g is [2, 1280], as for SDXL's second text encoder"),
        ({"emb_params": vectors(2, 768)}, "emb_params is [2, 768], as for Stable Diffusion 1.x, expected one tensor"),
        (
            {"a": vectors(1), "b": vectors(1)},
            "b is [1, 24], expected one tensor (vectors, width) for each text encoder",
        ),
        ({"a": vectors(19)}, "found 19 vectors for text_encoder, expected 1 to 18"),
        ({"a": np.float32(1)}, "a is [], expected one tensor"),
        ({}, "found no vectors, expected 1 to 18"),
    ],
)
def test_embeddings_for_other_checkpoints_are_refused(
    tiny: Bundle, tmp_path: Path, tensors: dict[str, Any], words: str
) -> None:
    file = embedding(tmp_path, "word", **{name: np.asarray(value) for name, value in tensors.items()})
    with pytest.raises(InputError) as caught:
        read_embedding(Path(file), tiny.config)
    assert words in str(caught.value)


def test_files_that_are_no_embeddings_are_refused(tiny: Bundle, tmp_path: Path) -> None:
    (tmp_path / "word.pt").write_bytes(b"nothing that is opened")
    with pytest.raises(InputError, match="found a pickle, expected safetensors"):
        with_embeddings(tiny.config, [tmp_path / "word.pt"])
    with pytest.raises(InputError, match="no such file, expected an embedding"):
        with_embeddings(tiny.config, [tmp_path / "word.safetensors"])
    file = embedding(tmp_path, "word", a=vectors(1))
    with pytest.raises(InputError, match="there is an embedding 'word' already, expected each name once"):
        with_embeddings(tiny.config, [file, file])


def test_captions_that_measure_the_scale_know_no_words(tiny: Bundle, tmp_path: Path) -> None:
    bundle = sdipc.add_embedding(tiny, embedding(tmp_path, "a", emb_params=10 * vectors(1)))
    assert sdipc.closed_form(bundle, cutoff=0.3).scale == sdipc.closed_form(tiny, cutoff=0.3).scale


def test_texts_pass_through_transformations(tiny: Bundle) -> None:
    texts = read_texts(tiny.config, ["(ab:2) c", "d"], prompt_weights=True)
    one_by_one = jax.vmap(lambda texts: sdipc.text_prompt(tiny, *Texts(*(each[None] for each in texts)))[0])(texts)
    np.testing.assert_allclose(one_by_one, sdipc.text_prompt(tiny, *texts), atol=1e-5)


def test_rows_of_jobs_are_done_together_where_their_prompts_are_as_long(tiny: Bundle) -> None:
    job = JobSettings(source="rows", long_text="chunk", prompt_weights=True)
    reader = Reader(tiny.config, job, tiny.config.defaults, "identity")
    size = {"height": 32, "width": 32}
    short = reader._tokens({"text": "(a:2)", "negative_prompt": ""} | size)
    long = reader._tokens({"text": "(a:2)", "negative_prompt": "x" * 30} | size)
    for texts, length in ((short, 20), (long, 40)):
        assert [each.tokens.shape for each in texts] == [(length,)] * 2
        assert [each.weights is not None and each.weights.shape for each in texts] == [(length,)] * 2
        item = Item(0, "key", size, tokens=texts[0], negative=texts[1])
        assert item.program == ((32, 32), length)
    assert short[0].weights is not None
    assert short[0].weights.tolist() == [1.0, 2.0, *[1.0] * 18]
