"""What trains the checkpoint that ships: its batches, its views of pictures, and that stopped training goes on."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
import train_embedded
from embedded import training
from embedded.augment import mixed, random_views
from embedded.clip import Clip, LossOptions, contrastive, divergence, unit
from embedded.data import Examples, examples
from embedded.plain import begin, contrastive_loss, shuffled
from embedded.tower import ConvolutionalTower
from embedded.training import Budget, train
from embedded.unet import moved
from safetensors.numpy import load_file

from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig

# Base concepts with their captions, and how many drawings each caption has.
CONCEPTS = {"cat": {"cat": 3}, "hand": {"hand": 2, "hand: dark": 1, "hand: light": 4}, "one": {"one": 1}}


@pytest.fixture(scope="module")
def drawings() -> Examples:
    rows = [
        (base, caption)
        for base, captions in CONCEPTS.items()
        for caption, count in captions.items()
        for _ in range(count)
    ]
    # In no order.
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    base, caption = (np.array(column) for column in zip(*rows, strict=True))
    pictures = np.zeros((len(rows), 64, 64, 3), np.uint8)
    others = {name: np.zeros(len(rows), int) for name in ("tone", "style", "vendor")}
    return examples(
        Corpus(pictures, caption, base, base, split=np.full(len(rows), "train"), manifest={}, **others), None
    )


def test_batches_are_pairs_of_a_concept(drawings: Examples) -> None:
    base = np.empty(len(drawings.label), int)
    for concept, (first, count) in enumerate(zip(drawings.first_caption, drawings.captions_of, strict=True)):
        for caption in range(first, first + count):
            start = drawings.first_row[caption]
            base[drawings.order[start : start + drawings.rows_of[caption]]] = concept
    rows = drawings.rows(np.random.default_rng(0), 50, 40)
    assert rows.shape == (50, 40)
    pairs = rows.reshape(-1, 2)
    assert (base[pairs[:, 0]] == base[pairs[:, 1]]).all()
    # All come, and a concept as often as the root of its size.
    assert set(rows.ravel()) == set(range(len(drawings.label)))
    shares = np.sqrt([3, 7, 1]) / np.sqrt([3, 7, 1]).sum()
    np.testing.assert_allclose(np.bincount(base[pairs[:, 0]]) / len(pairs), shares, atol=0.05)
    # Two drawings of one thing are two where there are two; in half of the pairs captions differ where they can.
    label = drawings.label[pairs]
    alone = np.bincount(drawings.label)[label[:, 0]] == 1
    same = label[:, 0] == label[:, 1]
    assert ((pairs[:, 0] != pairs[:, 1]) | alone)[same].all()
    assert 0.4 < same[base[pairs[:, 0]] == 1].mean() < 0.6


def views(pictures: np.ndarray, may_flip: bool = False, **options: float) -> np.ndarray:
    options = {"shift": 0.0, "zoom": 0.0} | options
    mask = jnp.full(len(pictures), may_flip)
    return np.asarray(random_views(jnp.asarray(pictures), mask, jax.random.key(0), **options))


def test_views_that_change_nothing_and_mirrored_ones() -> None:
    pictures = np.random.default_rng(0).random((16, 12, 12, 3)).astype(np.float32)
    np.testing.assert_allclose(views(pictures), pictures, atol=1e-5)
    found = views(pictures, may_flip=True)
    mirrored = [np.allclose(one, picture[:, ::-1], atol=1e-5) for one, picture in zip(found, pictures, strict=True)]
    plain = [np.allclose(one, picture, atol=1e-5) for one, picture in zip(found, pictures, strict=True)]
    assert all(one != other for one, other in zip(mirrored, plain, strict=True))
    assert 2 < sum(mirrored) < 14


@pytest.mark.parametrize("option", [{"shift": 0.2}, {"zoom": 0.3}, {"turn": 0.5}, {"bend": 0.05}])
def test_views_move_a_drawing_on_white(option: dict[str, float]) -> None:
    pictures = np.ones((8, 24, 24, 3), np.float32)
    pictures[:, 8:14, 8:12] = 0
    found = views(pictures, **option)
    changes = np.abs(found - pictures).max(axis=(1, 2, 3))
    assert changes.min() > 0.02
    assert np.median(changes) > 0.3
    # White comes in from outside, and there is about as much ink, 6 x 4 x 3.
    assert found[:, 0].min() > 0.99
    assert 36 < np.median((1 - found).sum(axis=(1, 2, 3))) < 144


def test_views_recolour_ink_and_leave_white() -> None:
    pictures = np.ones((8, 4, 4, 3), np.float32)
    pictures[:, 0] = (0.2, 0.6, 0.4)
    found = views(pictures, colour=0.3)
    np.testing.assert_array_equal(found[:, 1:], 1)
    assert np.abs(found[:, 0] - pictures[:, 0]).max() > 0.05
    tinted = views(pictures, background=1.0)
    assert ((tinted[:, 1:] >= 0.75) & (tinted[:, 1:] <= 1)).all()
    assert np.ptp(tinted[:, 1]) > 0.05


def test_views_cover_a_rectangle() -> None:
    found = views(np.zeros((32, 16, 16, 3), np.float32), cover=1.0)
    assert set(np.unique(found)) == {0, 1}
    for picture in found[..., 0]:
        rows, columns = picture.any(axis=1), picture.any(axis=0)
        np.testing.assert_array_equal(picture, rows[:, None] & columns)
        assert max(rows.sum(), columns.sum()) <= 8
    assert 0.02 < found.mean() < 0.2
    np.testing.assert_array_equal(views(np.zeros((4, 16, 16, 3), np.float32), cover=0.0), 0)


def test_every_second_picture_is_mixed_with_another() -> None:
    pictures = np.random.default_rng(0).random((8, 4, 4, 3)).astype(np.float32)
    found, weight = map(np.asarray, mixed(jnp.asarray(pictures), jax.random.key(0)))
    np.testing.assert_array_equal(found[::2], pictures[::2])
    np.testing.assert_array_equal(weight[::2], 0)
    for index in (1, 3, 5, 7):
        assert 0 < weight[index] < 1
        one, other = pictures[index], pictures[(index + 4) % 8]
        np.testing.assert_allclose(found[index], one + weight[index] * (other - one), atol=1e-5)


def test_teachers_learn_the_captions_of_both_pictures_of_a_mixture() -> None:
    text = CLIPTextConfig(
        vocab_size=5, hidden_size=4, intermediate_size=8, projection_dim=4, num_hidden_layers=1, num_attention_heads=1
    )
    vision = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=8,
        projection_dim=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    clip = Clip(text, vision, (16,), ("teacher_0", "teacher_1"))
    params = clip.init(jax.random.key(3))
    rng = np.random.default_rng(2)

    def captions(count: int, of: list[int]) -> dict[str, Any]:
        return {"of": jnp.array(of)} | {
            space: jnp.asarray(unit(rng.standard_normal((count, 4))), jnp.float32) for space in ("joint", "states")
        }

    data = {
        "pixels": jnp.asarray(rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)),
        "may_flip": jnp.zeros(4, bool),
        "to_states": jnp.asarray(rng.standard_normal((4, 4)), jnp.float32),
        "plain": captions(3, [0, 1, 2, 1]),
        "styled": captions(5, [4, 3, 2, 0]),
    }
    options = LossOptions({"shift": 0.0, "zoom": 0.0}, sharpest=7.0, agreement=3.0)
    key = jax.random.key(5)
    rows = np.array([2, 0, 3, 1])
    found, _ = clip.captions_loss(options, params, data, {"rows": jnp.asarray(rows)}, key)

    pictures, weight = map(np.asarray, mixed(data["pixels"][rows] / 255.0, jax.random.split(key, 2)[1]))
    wanted = 0.0
    for name in clip.teachers:
        embeds = np.asarray(unit(clip.teacher_embeds({name: params[name]}, jnp.asarray(pictures))), np.float64)
        for kind in ("plain", "styled"):
            table = {name: np.asarray(values, np.float64) for name, values in data[kind].items()}
            own = table["of"].astype(int)[rows]
            for space, vectors in (("joint", embeds), ("states", unit(embeds @ np.asarray(data["to_states"])))):
                for row in range(4):
                    share = weight[row]
                    target = np.zeros(len(table["joint"]))
                    target[own[row]] += 1 - share
                    target[own[(row + 2) % 4]] += share
                    scores = 7 * table[space] @ vectors[row]
                    smooth = 0.95 * target + 0.05 / len(target)
                    wanted -= smooth @ (scores - np.log(np.exp(scores).sum())) / 4 / 2
                    wanted += 3 / 4 * (1 - unit(target @ table[space]) @ vectors[row]) / 4
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_states_move_along_the_difference_of_two_others() -> None:
    states = np.random.default_rng(4).standard_normal((8, 1, 6)).astype(np.float32)
    share = np.linspace(0, 0.7, 8, dtype=np.float32)[:, None, None]
    found = np.asarray(moved(jnp.asarray(states), jnp.asarray(share)))[:, 0]
    for row in range(8):
        own, apart = states[row, 0], states[row - 2, 0] - states[row - 5, 0]
        further = own + share[row, 0] * np.linalg.norm(own) * unit(apart)
        np.testing.assert_allclose(found[row], np.linalg.norm(own) * unit(further), rtol=1e-4)
    same = np.ones((8, 1, 6), np.float32)
    np.testing.assert_allclose(moved(jnp.asarray(same), jnp.asarray(share)), same, rtol=1e-6)


def test_the_contrastive_loss_is_that_of_several_right_answers() -> None:
    rng = np.random.default_rng(0)
    images, texts = (unit(rng.standard_normal((6, 4))) for _ in range(2))
    label, sharpness = np.array([0, 0, 1, 2, 2, 2]), 7.0
    right = label[:, None] == label
    wanted = 0.0
    for scores in (sharpness * images @ texts.T, sharpness * texts @ images.T):
        for row in range(6):
            chances = np.exp(scores[row]) / np.exp(scores[row]).sum()
            among = right[row].sum()
            for column in range(6):
                share = 0.95 * right[row, column] / among + 0.05 / 6
                wanted -= share * np.log(chances[column]) / 6 / 2
    found, hit = contrastive(jnp.asarray(images), jnp.asarray(texts), jnp.asarray(right), sharpness)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    nearest = (images @ texts.T).argmax(axis=1)
    np.testing.assert_allclose(hit, right[np.arange(6), nearest].mean(), rtol=1e-6)


def test_the_divergence_is_that_of_the_chances() -> None:
    rng = np.random.default_rng(1)
    found, wanted, texts = (unit(rng.standard_normal((count, 4))) for count in (5, 5, 9))
    total, _ = divergence(jnp.asarray(found), jnp.asarray(wanted), jnp.asarray(texts), 3.0)
    chances = [np.exp(3 * rows @ texts.T) for rows in (wanted, found)]
    p, q = (each / each.sum(axis=1, keepdims=True) for each in chances)
    np.testing.assert_allclose(total, (p * np.log(p / q)).sum(axis=1).mean(), rtol=1e-4)
    total, hit = divergence(jnp.asarray(wanted), jnp.asarray(wanted), jnp.asarray(texts), 3.0)
    np.testing.assert_allclose(total, 0, atol=1e-6)
    assert hit == 1


def test_the_teacher_sees_the_whole_picture() -> None:
    tower = ConvolutionalTower((16, 32), 24, groups=4)
    pictures = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3)), jnp.float32)
    params = tower.init(jax.random.key(0), pictures)
    features = tower.apply(params, pictures)
    assert features.shape == (2, 24)
    for place in ((0, 0), (15, 15), (7, 3)):
        changed = tower.apply(params, pictures.at[0, place[0], place[1]].add(0.5))
        assert np.abs(changed[0] - features[0]).max() > 1e-4
        np.testing.assert_allclose(changed[1], features[1], atol=1e-6)


def test_muon_on_stacked_matrices_is_muon_on_each() -> None:
    rng = np.random.default_rng(0)
    shapes = {"one": (8, 6), "other": (8, 6), "wide": (4, 12), "kernel": (3, 3, 2, 6), "tall": (18, 6)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    stacked = training._muon()
    alone = optax.contrib.scale_by_muon()
    state = stacked.init(params)
    states = {
        name: alone.init(jnp.zeros((leaf.size // leaf.shape[-1], leaf.shape[-1]))) for name, leaf in params.items()
    }
    for _ in range(3):
        gradients = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
        found, state = stacked.update(gradients, state)
        for name, gradient in gradients.items():
            matrix = gradient.reshape(-1, gradient.shape[-1])
            step, states[name] = alone.update(matrix, states[name])
            wanted = 0.2 * max(matrix.shape) ** 0.5 * step
            np.testing.assert_allclose(found[name].reshape(matrix.shape), wanted, atol=1e-5)


class Killed(Exception):
    """Instead of a signal."""


def learn(folder: Path, killed_at: int | None = None) -> Any:
    """Finds numbers by noisy descent; may be killed at a step."""
    data = {"wanted": jnp.arange(6.0)}

    def batches(step: int) -> dict[str, np.ndarray]:
        if step == killed_at:
            raise Killed
        return {"rows": np.random.default_rng(step).integers(0, 6, (1, 4))}

    def loss(params: Any, data: Any, batch: Any, key: Any) -> Any:
        noise = 0.1 * jax.random.normal(key, (4,))
        error = jnp.mean((params["layers"][batch["rows"], 0] - data["wanted"][batch["rows"]] + noise) ** 2)
        return error, {"loss": error}

    # Ten minutes at five seconds a step: 120 steps.
    budget = Budget(minutes=10, learning_rate=0.3, warmup=5, weight_decay=0.0, ema=0.9)
    start = {"layers": jnp.zeros((6, 1))}
    return train("numbers", start, loss, data, batches, budget, folder, seed=0)


def test_stopped_training_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 5.0)
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = learn(tmp_path / "whole")
    np.testing.assert_allclose(whole["layers"][:, 0], np.arange(6), atol=0.5)
    with pytest.raises(Killed):
        learn(tmp_path / "killed", killed_at=75)
    assert 30 < load_file(tmp_path / "killed/numbers.safetensors")["progress.step"] < 75
    again = learn(tmp_path / "killed")
    np.testing.assert_array_equal(again["layers"], whole["layers"])


def test_the_plain_loss_is_the_symmetric_contrastive_one() -> None:
    text = CLIPTextConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, projection_dim=6, num_hidden_layers=1, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        projection_dim=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    clip = Clip(text, vision, (), ())
    params = begin(clip, jax.random.key(0), sharpness=20.0)
    rng = np.random.default_rng(0)
    tokens = np.array([[10, 1, 11, 11], [10, 2, 3, 11], [10, 4, 11, 11]], np.int32)
    data = {
        "pixels": rng.integers(0, 256, (3, 8, 8, 3), np.uint8),
        "may_flip": np.zeros(3, bool),
        "plain": tokens,
        "styled": tokens[::-1],
    }
    batch = {"rows": np.array([2, 0, 1]), "styled": np.array([False, False, True])}
    options = {"shift": 0.0, "zoom": 0.0}
    found, metrics = contrastive_loss(clip, options, params, jax.tree.map(jnp.asarray, data), batch, jax.random.key(1))
    read = np.array([tokens[2], tokens[0], tokens[1]])
    states = np.asarray(clip.text_states(params, read))[np.arange(3), [2, 2, 3]]
    texts = unit(states @ np.asarray(params["text_projection"]["kernel"]))
    images = unit(np.asarray(clip.image_embeds(params, jnp.asarray(data["pixels"][batch["rows"]] / 255.0))))
    scores = 20.0 * images @ texts.T
    expected = [
        -np.mean(np.diag(each - np.log(np.exp(each).sum(axis=1, keepdims=True)))) for each in (scores, scores.T)
    ]
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-4)
    assert float(metrics["gap"]) == pytest.approx(np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0)), rel=1e-4)


def test_an_epoch_has_every_picture_once() -> None:
    rows = np.concatenate([shuffled(20, 4, 0, step)["rows"][0] for step in range(10)])
    assert sorted(rows[:20]) == sorted(rows[20:]) == [*range(20)]
    assert (rows[:20] != rows[20:]).any()


def test_parts_that_begin_anew_are_random_and_the_others_stay() -> None:
    old, new = ({"a": {"to_k": value}, "b": {"to_q": value}} for value in (1, 2))
    assert train_embedded.anew(old, new, ["a.to_k"]) == {"a": {"to_k": 2}, "b": {"to_q": 1}}
