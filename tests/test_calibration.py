"""The general closed form: fitted to captions, checked against NumPy, on towers whose answer is known."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdipc_jax as sdipc
from sdipc_jax import Bundle, InputError, calibrate, closed_form, convert, encode_images, load
from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.text_tower import TextTower, load_text_tower
from sdipc_jax.prompts.calibration import (
    caption_states,
    caption_vectors,
    fit_captions,
    mean_of_pictures,
    picture_vectors,
    shifted,
)
from sdipc_jax.prompts.everyday import _STYLED, everyday_captions
from sdipc_jax.prompts.ridge import RidgeMap, explained, fit, unit
from sdipc_jax.prompts.tokens import token_ids
from tests.compare import relative_error

CAPTIONS = everyday_captions(60)
EXAMPLES = sorted(Path("examples").glob("*.png"))


def random_pairs(count: int = 200, joint: int = 6, width: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Joint vectors and states, one place, that have something to do with each other."""
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((count, joint)) * np.linspace(2, 0.1, joint) + 1
    h = unit(w) @ generator.standard_normal((joint, width)) + 0.1 * generator.standard_normal((count, width)) + 3
    return w, h[:, None]


@pytest.mark.parametrize("ridge", [0.0, 0.3, 2.0])
def test_equals_a_reference(ridge: float) -> None:
    """The formula as it is written, by way of a linear system instead of axes."""
    w, h = random_pairs()
    fitted = fit(w, h, ridge)
    u = w / np.linalg.norm(w, axis=1, keepdims=True)
    covariance = np.cov(u.T, bias=True)
    cross = (u - u.mean(0)).T @ (h[:, 0] - h[:, 0].mean(0)) / len(u)
    expected = np.linalg.solve(covariance + ridge * np.trace(covariance) / 6 * np.eye(6), cross)
    np.testing.assert_allclose(fitted.matrix[0], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fitted.intercept[0], h[:, 0].mean(0), rtol=1e-12)
    np.testing.assert_allclose(fitted.centre, u.mean(0), rtol=1e-12)
    np.testing.assert_allclose(fitted.length, [[np.linalg.norm(h[:, 0], axis=1).mean()]], rtol=1e-12)
    np.testing.assert_allclose(fitted.deviations**2, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-9)
    level = ridge * np.trace(covariance) / 6
    assert fitted.rank == np.sum(np.linalg.eigvalsh(covariance) >= level)


def test_recovers_a_linear_target() -> None:
    w, _ = random_pairs()
    matrix = np.random.default_rng(1).standard_normal((6, 5))
    h = unit(w) @ matrix + 7
    fitted = fit(w, h[:, None], 0.0)
    np.testing.assert_allclose(fitted.matrix[0], matrix, rtol=1e-6)
    np.testing.assert_allclose(fitted(w), h, rtol=1e-9)
    assert explained(fitted(w), h) == pytest.approx(1)


def test_no_length_of_the_joint_vectors_counts() -> None:
    w, h = random_pairs()
    lengths = np.random.default_rng(2).uniform(0.1, 10, (len(w), 1))
    np.testing.assert_allclose(fit(lengths * w, h, 0.3).matrix, fit(w, h, 0.3).matrix, rtol=1e-9)


def test_a_constant_added_to_all_states_passes_through() -> None:
    w, h = random_pairs()
    before, after = fit(w, h, 0.3), fit(w, h + 5, 0.3)
    np.testing.assert_allclose(after(w), before(w) + 5, rtol=1e-9)
    np.testing.assert_allclose(after.matrix, before.matrix, rtol=1e-6, atol=1e-12)


def test_what_lies_outside_the_captions() -> None:
    """Captions that vary in a plane alone: what stands upright on it is outside."""
    generator = np.random.default_rng(0)
    w = np.concatenate([0.1 * generator.standard_normal((400, 2)), np.ones((400, 1)), np.zeros((400, 1))], axis=1)
    fitted = fit(w, random_pairs(400)[1], 0.1)
    assert fitted.rank == 2
    inside, upright = (fitted.centre[None] + 0.3 * np.eye(4)[[axis]] for axis in (0, 3))
    at_length = [each / np.linalg.norm(each) for each in (inside, upright)]
    assert fitted.outside(at_length[0])[0] < 0.1
    assert fitted.outside(at_length[1])[0] > 0.9


def with_text(bundle: Bundle, **changes: Any) -> Bundle:
    return dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, **changes))


@pytest.fixture(scope="module")
def tower(tiny: Bundle) -> TextTower:
    return load_text_tower(tiny.config)


def features_of(bundle: Bundle, count: int, seed: int = 0) -> np.ndarray:
    width = bundle.config.vision_side.vision.hidden_size
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def by_hand(bundle: Bundle, fitted: RidgeMap, features: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    u = unit(picture_vectors(bundle, features)) - (fitted.centre if centre is None else centre)
    states = fitted.intercept[0] + u @ fitted.matrix[0]
    return fitted.length[0, 0] * states / np.linalg.norm(states, axis=1, keepdims=True)


def test_convert_takes_what_calibrate_gives(tiny: Bundle, tower: TextTower) -> None:
    features = features_of(tiny, 40)
    w, (h, widths) = caption_vectors(tower, CAPTIONS), caption_states(tiny, CAPTIONS)
    assert widths == ()
    tokens = sdipc.tokenize(tiny, CAPTIONS, truncate=True)
    ends = [list(row).index(tiny.config.tokens.end) for row in tokens]
    np.testing.assert_allclose(h[:, 0], sdipc.text_prompt(tiny, tokens)[np.arange(60), ends], atol=1e-5)
    # The tiny checkpoint's text encoder is the CLIP's own text tower.
    np.testing.assert_allclose(w, h[:, 0] @ tower.projection, rtol=1e-4, atol=1e-4)
    fitted = fit(w, h, 0.3)
    found = convert(calibrate(tiny, CAPTIONS), jnp.asarray(features))
    assert relative_error(found, by_hand(tiny, fitted, features)) <= 1e-5
    again = convert(calibrate(tiny, CAPTIONS), jnp.asarray(features))
    np.testing.assert_array_equal(found, again)
    shift = calibrate(tiny, CAPTIONS, features)
    centre = mean_of_pictures(tiny, features)
    assert relative_error(convert(shift, features), by_hand(tiny, fitted, features, centre)) <= 1e-5
    mapped = jax.vmap(convert, in_axes=(None, 0))(shift, features.reshape(2, 20, -1))
    assert relative_error(mapped.reshape(40, -1), convert(shift, features)) <= 1e-5


@pytest.mark.parametrize("method", ["pinv", "ridge"])
def test_a_constant_added_to_all_picture_vectors_is_undone(tiny: Bundle, tower: TextTower, method: str) -> None:
    """Of unit vectors; what is added turns each by its own angle, so that the test adds it after that."""
    joint = unit(np.random.default_rng(0).standard_normal((50, 24)))
    offset = 0.4 * unit(np.ones(24))
    w0 = unit(caption_vectors(tower, CAPTIONS)).mean(axis=0)
    base = closed_form(tiny) if method == "pinv" else calibrate(tiny, CAPTIONS)
    found = []
    for vectors in (joint, joint + offset):
        mean = vectors.mean(axis=0)
        projection = (
            shifted(base, mean, w0)
            if method == "pinv"
            else dataclasses.replace(base, centre=jnp.asarray(mean, jnp.float32))
        )
        states = (vectors - np.asarray(projection.centre)) @ np.asarray(projection.inverse, np.float64)
        found.append(states)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_two_parts_have_a_length_each() -> None:
    w, h = random_pairs(width=5)
    fitted = fit(w, h, 0.3, (2, 3))
    np.testing.assert_allclose(
        fitted.length, [[np.linalg.norm(h[:, 0, part], axis=1).mean() for part in (slice(2), slice(2, 5))]]
    )


def test_each_place_has_its_own_state_where_asked(tiny: Bundle, other_pad: Bundle, tower: TextTower) -> None:
    fitted = fit_captions(other_pad, tower, CAPTIONS, after_end="own")
    projection = fitted.projection(other_pad)
    features = jnp.asarray(features_of(tiny, 3))
    places = other_pad.config.tokens.length - 1
    vectors = convert(projection, features)
    assert vectors.shape == (3, places, 24)
    states, _ = caption_states(other_pad, CAPTIONS, "own")
    np.testing.assert_allclose(
        np.linalg.norm(vectors, axis=-1), np.tile(np.linalg.norm(states, axis=-1).mean(axis=0), (3, 1)), rtol=1e-4
    )
    context = sdipc.image_prompt(other_pad, vectors)
    np.testing.assert_array_equal(context[:, 1:], vectors)
    tokens = sdipc.tokenize(other_pad, ["ab"])
    edited = sdipc.edit_prompt(other_pad, vectors, tokens, 0.5)
    text = sdipc.text_prompt(other_pad, tokens)
    np.testing.assert_array_equal(edited[:, 1:3], np.tile(text[:, 1:3], (3, 1, 1)))
    np.testing.assert_allclose(edited[:, 3:], vectors[:, 2:] + 0.5 * text[:, 3:], rtol=1e-5, atol=1e-6)
    empty = sdipc.edit_prompt(other_pad, vectors, sdipc.tokenize(other_pad, [""]), 0.0)
    np.testing.assert_array_equal(empty, context)
    # Captions of three tokens and more end after the first places, which count as their ends.
    repeated = convert(fit_captions(other_pad, tower, CAPTIONS).projection(other_pad), features)
    assert relative_error(vectors[:, 0], repeated) <= 1e-5
    assert relative_error(vectors[:, -1], repeated) > 0.01


def test_another_clip_drives_the_checkpoint(tiny: Bundle, tower: TextTower) -> None:
    """Of another width, with a tokenizer of its own: nothing but captions joins the two."""
    wide = dataclasses.replace(tiny.config.text, hidden_size=48, num_attention_heads=4)
    side = dataclasses.replace(tiny.config.vision_side, text=wide)
    other = with_text(tiny, clip=side)
    told = r"text_projection is \(24, 48\) but the UNet reads 24-wide prompts: .*ridge \(in Python"
    with pytest.raises(InputError, match=told):
        closed_form(other)
    generator = np.random.default_rng(0)
    own = dataclasses.replace(tower, config=dataclasses.replace(tower.config, text=wide))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(own.model.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape) * 0.2, jnp.float32), shapes)
    projection = generator.standard_normal((48, 24)).astype(np.float32)
    own = dataclasses.replace(own, params=params, projection=projection)
    fitted = fit_captions(other, own, CAPTIONS, 0.1)
    vectors = convert(fitted.projection(other), jnp.asarray(features_of(tiny, 2)))
    assert vectors.shape == (2, 24)
    assert fitted.ridge == 0.1
    # Not of the last layer of that CLIP's text tower.
    assert fit_captions(other, own, CAPTIONS).ridge == 1.0
    assert fit_captions(tiny, tower, CAPTIONS).ridge == 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"captions": CAPTIONS[:24], "ridge": 0.0}, "found 24 captions without a ridge, expected more than the 24 dim"),
        ({"captions": CAPTIONS[:19]}, "found 19 captions, expected at least 20"),
        ({"captions": "a cat"}, "captions is the string 'a cat', expected a list"),
        ({"ridge": -1.0}, "ridge is -1.0, expected 0 or more"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"after_end": "none"}, "after_end is 'none', expected 'repeat' or 'own'"),
        ({"pictures": np.ones((29, 32), np.float32)}, "found 29 pictures for the mean shift, expected at least 30"),
    ],
)
def test_what_is_refused(tiny: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        calibrate(tiny, **{"captions": CAPTIONS} | options)


def test_built_in_captions() -> None:
    captions = everyday_captions()
    assert len(captions) == len(set(captions)) == 4000
    assert captions == everyday_captions()
    assert everyday_captions(100) == captions[:100]
    assert all(re.fullmatch(r"[A-Za-z0-9' ,-]+", caption) and "  " not in caption for caption in captions)
    # Nothing of the grammar is left, and every template was used.
    assert not any(re.search(r"\b[A-Z]{2,}\b", caption) for caption in captions)
    styled = [
        word for template in _STYLED for word in template.split() if word in ("MEDIUM", "MANNER", "LOOK,", "LOOK")
    ]
    assert len(styled) >= len(_STYLED)
    assert len({caption.split()[-1] for caption in captions}) > 200


# Names of the kind that the shipped checkpoint was trained on.
ANIMALS = """cat dog fox lion tiger horse cow pig mouse hamster rabbit bear panda koala monkey gorilla frog chicken
penguin owl eagle duck swan turtle snake whale dolphin shark octopus crab snail butterfly bee spider elephant camel
zebra kangaroo wolf""".split()
FOODS = """apple pear banana lemon grapes watermelon strawberry tomato potato carrot corn mushroom bread croissant
pancakes cheese pizza sandwich taco egg salad cookie cake chocolate candy""".split()
THINGS = """car bus truck tractor bicycle motorcycle train airplane helicopter rocket ship anchor house castle tent
clock watch telephone television camera violin drum trumpet key hammer book envelope pencil scissors bell balloon
gift crown glasses shirt shoe umbrella circle square star""".split()
COLORS = "red orange yellow green blue purple brown black white".split()
JOBS = "teacher student cook farmer mechanic scientist artist pilot astronaut firefighter detective guard judge".split()
TONES = ["", *(f": {tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark"))]


def emoji_names() -> list[str]:
    names = [f"{animal}{what}" for animal in ANIMALS for what in ("", " face")] + FOODS + THINGS
    names += [f"{color} {thing}" for color in COLORS for thing in (*THINGS, *FOODS)]
    names += [f"{person} {job}{tone}" for person in ("man", "woman") for job in JOBS for tone in TONES]
    names += [f"{name}, flat style" for name in names]
    return [names[place] for place in np.random.default_rng(0).permutation(len(names))]


@pytest.fixture(scope="module")
def shipped() -> tuple[Bundle, TextTower]:
    bundle = load("embedded")
    return bundle, load_text_tower(bundle.config)


def layer_before_the_last(tower: TextTower, texts: list[str]) -> np.ndarray:
    """`hidden_states[-2]` in transformers: what comes into the last layer, with no norm; at the end token."""
    tokens = token_ids(tower.config, texts, truncate=True)
    ends = np.array([list(row).index(tower.config.tokens.end) for row in tokens])
    layer = str(tower.config.text.num_hidden_layers - 2)

    @jax.jit
    def at_end(params: Any, tokens: np.ndarray, ends: np.ndarray) -> Any:
        options = {"capture_intermediates": lambda module, _: module.name == layer, "mutable": "intermediates"}
        _, state = tower.model.apply({"params": params}, tokens, **options)
        found = state["intermediates"]["text_model"]["encoder"]["layers"][layer]["__call__"][0]
        return found[jnp.arange(len(ends)), ends]

    return in_batches(lambda *rows: at_end(tower.params, *rows), tokens[:, : ends.max() + 1], ends)


def test_without_a_ridge_the_last_layer_comes_back(shipped: tuple[Bundle, TextTower]) -> None:
    bundle, tower = shipped
    names = emoji_names()[:400]
    w, (h, _) = caption_vectors(tower, names), caption_states(bundle, names)
    fitted = fit(w[:300], h[:300], 1e-9)
    assert explained(fitted(w[300:]), h[300:, 0]) > 0.999


def test_the_layer_before_the_last_is_reached(shipped: tuple[Bundle, TextTower]) -> None:
    bundle, tower = shipped
    names = emoji_names()[:1200]
    w, h = caption_vectors(tower, names), layer_before_the_last(tower, names)
    fitted = fit(w[:1000], h[:1000, None], 0.3)
    assert explained(fitted(w[1000:]), h[1000:]) > 0.85
    features = encode_images(bundle, jnp.asarray(sdipc.read_pictures(bundle, EXAMPLES)))
    u = picture_vectors(bundle, np.asarray(features))
    truth = layer_before_the_last(tower, [path.stem.replace("-", " ") for path in EXAMPLES])
    length = fitted.length[0, 0]
    naive = length * unit(u @ np.linalg.pinv(tower.projection.astype(np.float64)))
    assert explained(length * unit(fitted(u)), truth) > explained(naive, truth) + 0.25
