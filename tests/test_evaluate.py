"""Metrics against hand-computed numbers and plain implementations; the command on a checkpoint in miniature."""

import itertools
import json
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from PIL import Image

from sdipc_jax import Bundle, closed_form, convert
from sdipc_jax.batches import in_batches
from sdipc_jax.commands.evaluate import EvaluateSettings, Tables
from sdipc_jax.commands.evaluate import measure as evaluate
from sdipc_jax.errors import InputError
from sdipc_jax.evaluate import backbone, editing, metrics, pictures, retrieval
from sdipc_jax.evaluate.corpus import COLUMNS, Corpus
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.tables import Estimate, Table


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_recall_counts_the_nearest_by_direction() -> None:
    targets = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    queries = np.array([[9.0, 1.0], [1.0, 9.0], [0.1, 0.2]])
    truth = np.array([0, 1, 0])
    assert metrics.recall(queries, targets, truth, 1) == pytest.approx(2 / 3)
    assert metrics.recall(queries, targets, truth, 2) == 1.0


@pytest.mark.parametrize("nothing", [0.0, np.nan])
def test_features_that_say_nothing_find_nothing(nothing: float) -> None:
    assert metrics.recall(np.full((4, 3), nothing), normal(0, 20, 3), np.arange(4), 10) == 0.0


def test_kernel_distance_is_the_double_loop() -> None:
    x, y = normal(0, 7, 3), normal(1, 5, 3) + 1

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a, b) / 3 + 1) ** 3)

    within_x = np.mean([kernel(x[i], x[j]) for i, j in itertools.permutations(range(7), 2)])
    within_y = np.mean([kernel(y[i], y[j]) for i, j in itertools.permutations(range(5), 2)])
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert metrics.kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    distances = [metrics.kernel_distance(normal(2 * n, 20, 4), normal(2 * n + 1, 20, 4)) for n in range(200)]
    error = np.std(distances) / np.sqrt(len(distances))
    assert abs(np.mean(distances)) < 3 * error
    assert metrics.kernel_distance(normal(0, 20, 4), normal(1, 20, 4) + 1) > 5 * np.std(distances)


def test_the_spread_over_halves_is_the_standard_error() -> None:
    whole = [metrics.kernel_distance(normal(2 * n, 60, 4), normal(2 * n + 1, 60, 4) + 0.5) for n in range(100)]
    spreads = [
        np.std(metrics.kernel_distances_of_halves(normal(2 * n, 60, 4), normal(2 * n + 1, 60, 4) + 0.5))
        for n in range(20)
    ]
    assert np.mean(spreads) == pytest.approx(np.std(whole), rel=0.3)


def test_halves_of_two_methods_are_pairs() -> None:
    x, y = normal(0, 20, 3), normal(1, 30, 3)
    np.testing.assert_array_equal(
        metrics.kernel_distances_of_halves(x, y, draws=5), metrics.kernel_distances_of_halves(x.copy(), y, draws=5)
    )


@pytest.mark.parametrize("count", [4, 40])
def test_frechet_distance_is_the_matrix_square_root(count: int) -> None:
    x, y = normal(0, count, 6), normal(1, 30, 6) @ normal(2, 6, 6) + 1
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # Below full rank the square root is only defined as a limit.
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-10 * np.eye(6)).real
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    x = normal(0, 10, 3)
    assert metrics.frechet_distance(x, x + np.array([1.0, 2.0, 2.0])) == pytest.approx(9.0)


def test_spearman_is_scipys_with_ties() -> None:
    x, y = np.round(normal(0, 8, 6)), np.round(2 * normal(1, 8, 6))
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(metrics.spearman(x, y), expected, atol=1e-12)


def test_spearman_of_a_constant_is_no_trend() -> None:
    assert metrics.spearman(np.arange(6.0)[None], np.ones((1, 6))).tolist() == [0.0]


def test_bootstrap_interval_is_about_two_standard_errors() -> None:
    values = normal(0, 400)
    low, high = metrics.bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
    assert metrics.bootstrap_interval(values) == (low, high)


def test_concepts_forgive_a_wrong_tone() -> None:
    captions = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    base = np.array(["hand", "hand", "cat"])
    columns = retrieval.retrieval_columns(np.array([[1.0, 0.0], [0.0, 1.0]]), captions, np.array([1, 1]), base)
    assert columns["R@1"].tolist() == [0.0, 0.0]
    assert columns["R@5"].tolist() == [1.0, 1.0]
    assert columns["concept R@1"].tolist() == [1.0, 0.0]


def test_an_estimate_is_the_mean_over_seeds_and_pictures() -> None:
    estimate = Estimate.of_mean(np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert (estimate.value, estimate.by_seed) == (0.75, (0.5, 1.0))
    # The pictures' means over seeds are 1 and 0.5.
    assert estimate.interval == (0.5, 1.0)
    assert Estimate.of_mean(np.ones((1, 3))).by_seed == ()


def test_tables_are_markdown_and_json() -> None:
    table = Table("t", "Title", "Note.", ("a", "b"), (("row", (Estimate(0.25, (0.1, 0.4)), None)),))
    assert table.to_markdown().splitlines()[-3:] == [
        "| | a | b |",
        "|---|---|---|",
        "| row | 0.250 [0.100, 0.400] | - |",
    ]
    assert table.to_json()["rows"] == {"row": {"a": {"value": 0.25, "interval": [0.1, 0.4]}}}
    assert table["row", "a"].value == 0.25
    with pytest.raises(KeyError):
        _ = table["row", "b"]


def test_more_pictures_begin_with_the_same_ones() -> None:
    held = tiny_corpus()
    assert pictures.choose(held, 8)[:4].tolist() == pictures.choose(held, 4).tolist()


def test_edits_choose_what_they_can_change() -> None:
    held = tiny_corpus()
    for edit in editing.EDITS:
        chosen = held.where(editing.choose_for(edit, held, 100))
        assert len(chosen) > 1
        assert len(set(chosen.base.tolist())) == len(chosen)
        assert set(chosen.tone.tolist()) == ({1} if edit.kind == "skin tone" else {0})


def test_in_batches_always_has_one_shape() -> None:
    shapes = []

    def double(x: np.ndarray) -> np.ndarray:
        shapes.append(x.shape)
        return 2 * x

    assert in_batches(double, np.arange(7), size=3).tolist() == list(range(0, 14, 2))
    assert set(shapes) == {(3,)}


def test_every_kind_of_prompt_is_measured_against_its_own_picture(tiny: Bundle) -> None:
    held = tiny_corpus()
    projection = closed_form(tiny)
    backbones = pictures.Backbones(tiny, None)
    vectors = np.asarray(convert(projection, jnp.asarray(retrieval.image_features(tiny, held.pictures))))

    def draw(context: Any, seed: int, indices: np.ndarray) -> np.ndarray:
        """The very picture that was the prompt; the first one for texts."""
        distance = np.linalg.norm(np.asarray(context)[:, None, -1] - vectors[None], axis=-1)
        nearest = np.where(distance.min(axis=1) < 1e-3, distance.argmin(axis=1), 0)
        return held.pictures[nearest]

    chosen = pictures.choose(held, 6)
    sampler = cast(Sampler, draw)
    measured = pictures.measure_pictures(tiny, projection, backbones, sampler, held, chosen, [0, 1], styled=False)
    own = measured.held[pictures.OWN]
    table = pictures.similarity_table(backbones, measured)
    column = f"similarity, {pictures.OWN}"
    assert table[pictures.SD_IPC, column].value == pytest.approx(1)
    assert table[pictures.REAL, column].value == pytest.approx(1)
    assert len(table[pictures.SD_IPC, column].by_seed) == 2
    other = chosen[pictures.shuffled(held.base[chosen])]
    assert (held.base[chosen] != held.base[other]).all()
    expected = metrics.cosines(own[other], own[chosen]).mean()
    assert table[pictures.SHUFFLED, column].value == pytest.approx(expected)
    assert backbone.EXTRA in table.note
    made = measured.made
    assert made[pictures.SD_IPC][pictures.OWN][0] == pytest.approx(made[pictures.REAL][pictures.OWN][0], abs=1e-5)


def test_the_independent_backbone_has_columns_of_its_own(tiny: Bundle) -> None:
    held = {pictures.OWN: normal(0, 30, 4), pictures.INDEPENDENT: normal(1, 30, 6)}
    chosen = np.arange(10)
    # Text prompts are further away than SD-IPC in both ways that are measured: each picture's, and the whole set's.
    made = {
        kind: {name: values[chosen][None] + error for name, values in held.items()}
        for kind, error in ((pictures.SD_IPC, 0.5), (pictures.TEXT, 1.5), (pictures.REAL, 0.0))
    }
    backbones = pictures.Backbones(tiny, lambda batch: np.zeros((len(batch), 6)))
    table = pictures.similarity_table(backbones, pictures.Measured(chosen, held, made))
    frechet = "EffNet-Lite0 Frechet distance"
    assert table.columns[-1] == frechet
    assert backbone.EXTRA not in table.note
    assert 0 < table[pictures.SD_IPC, frechet].value < table[pictures.TEXT, frechet].value
    for name in backbones.names:
        gain = table["SD-IPC - text prompt", f"similarity, {name}"]
        assert gain.interval is not None
        assert gain.interval[0] > 0
        ratio = table["SD-IPC / text prompt", f"kernel distance, {name}"]
        parts = [table[kind, f"kernel distance, {name}"].value for kind in (pictures.SD_IPC, pictures.TEXT)]
        assert ratio.value == pytest.approx(parts[0] / parts[1])
        assert parts[0] < parts[1]


@pytest.fixture(scope="module")
def evaluated(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tables, list[float]]:
    """One run of the command, and how it said it was coming along."""
    folder = tmp_path_factory.mktemp("evaluate")
    reports: list[float] = []
    return evaluate(settings(tiny_folder, write_corpus(folder / "corpus.npz"), folder / "out"), reports.append), reports


def settings(model: Path, corpus: Path, output: Path) -> EvaluateSettings:
    return EvaluateSettings(model=str(model), corpus=corpus, count=4, steps=2, batch_size=4, output_dir=output)


def test_the_command_writes_tables_and_sheets(evaluated: tuple[Tables, list[float]]) -> None:
    evaluation, reports = evaluated
    result, markdown, *images = evaluation.files
    assert json.loads(result.read_text()) == json.loads(json.dumps(evaluation.to_json()))
    assert markdown.read_text() == evaluation.to_markdown()
    for path in images:
        with Image.open(path) as image:
            assert min(image.size) > 100
    record = json.loads(result.read_text())
    assert list(record["tables"]) == ["retrieval", "recognition", "similarity", "editing"]
    assert record["settings"]["count"] == 4
    assert record["checkpoint"]
    assert reports == sorted(reports)
    assert reports[-1] == 1.0


def test_a_second_run_is_refused(evaluated: tuple[Tables, list[float]], tiny_folder: Path, tmp_path: Path) -> None:
    folder = evaluated[0].files[0].parent
    with pytest.raises(InputError, match=r"evaluation.json is there already: .* --overwrite"):
        evaluate(settings(tiny_folder, write_corpus(tmp_path / "corpus.npz"), folder), lambda done: None)


def test_without_a_corpus_it_says_how_to_build_one(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run `python scripts/build_corpus.py`"):
        evaluate(settings(tiny_folder, tmp_path / "none.npz", tmp_path / "out"), lambda done: None)
    assert not (tmp_path / "out").exists()


def columns() -> dict[str, np.ndarray]:
    """Things of one colour each, drawn by two vendors, one of them held out."""
    rng = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    tones = {"heart": 0, "cat": 0, "red book": 0, "square": 0, "hand: light skin tone": 1, "ear: light skin tone": 1}
    for name, tone in tones.items():
        colour = rng.integers(0, 256, 3)
        for style, split in (("noto", "train"), ("twemoji", "cells")):
            picture = np.full((64, 64, 3), 255, np.uint8)
            picture[16:48, 16:48] = np.clip(colour + rng.integers(-9, 9, 3), 0, 255)
            rows.append((picture, name, name, name.split(":")[0], tone, style, style, split))
    return {name: np.array(values) for name, values in zip(COLUMNS, zip(*rows, strict=True), strict=True)}


def tiny_corpus() -> Corpus:
    """The held-out ones."""
    found = columns()
    return Corpus(**found, manifest={}).where(found["split"] == "cells")


def write_corpus(path: Path) -> Path:
    np.savez(path, allow_pickle=False, **columns(), manifest=np.array(json.dumps({"sha256": "00"})))
    return path
