"""Arithmetic on pictures' vectors: hand-computed values, and properties that any values have."""

import numpy as np
import pytest

from sdipc_jax import InputError
from sdipc_jax.prompts import algebra


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def directions() -> np.ndarray:
    """Three, of which the last depends on the others."""
    first, second = np.random.default_rng(1).standard_normal((2, 16))
    return np.stack([first, second, 2 * first - second])


def lengths(rows: object) -> np.ndarray:
    return np.linalg.norm(np.asarray(rows), axis=-1)


def test_mixing_is_symmetric(vectors: np.ndarray) -> None:
    weights, order = np.array([1, 2, 3, 4, 5]), [3, 1, 4, 0, 2]
    mixed = algebra.mean(vectors, weights)
    np.testing.assert_allclose(mixed, algebra.mean(vectors[order], weights[order]), atol=1e-6)
    np.testing.assert_allclose(mixed[0], weights @ vectors.astype(np.float64) / 15, atol=1e-6)
    np.testing.assert_allclose(algebra.mean(vectors, 7 * weights), mixed, atol=1e-6)
    np.testing.assert_allclose(algebra.mean(vectors)[0], vectors.mean(axis=0), atol=1e-6)


def test_means_are_short_and_directions_are_not(vectors: np.ndarray) -> None:
    unit = algebra.with_length(vectors, 3.0)
    np.testing.assert_allclose(lengths(unit), 3, rtol=1e-6)
    assert lengths(algebra.mean(unit)) < 2
    np.testing.assert_allclose(lengths(algebra.mean_direction(unit, [1, -2, 0.5, 1, 1], 3.0)), 3, rtol=1e-6)


@pytest.mark.parametrize("weights", [[1, -1, 0, 0, 0], [0] * 5, [1, 2], [[1] * 5]])
def test_weights_that_will_not_do(vectors: np.ndarray, weights: list[float]) -> None:
    with pytest.raises(InputError, match=r"expected a sum that is not 0|expected \(5,\): one for each vector"):
        algebra.mean(vectors, weights)


def test_slerp_keeps_length_and_goes_evenly(vectors: np.ndarray) -> None:
    a, b = algebra.with_length(vectors[:1], 2.0), algebra.with_length(vectors[1:2], 2.0)
    way = np.asarray(algebra.slerp(a, b, np.linspace(0, 1, 7)), np.float64)
    np.testing.assert_allclose(lengths(way), 2, rtol=1e-5)
    np.testing.assert_allclose(way[[0, -1]], np.concatenate([a, b]), atol=1e-6)
    angles = np.arccos(np.sum(way[1:] * way[:-1], axis=1) / 4)
    np.testing.assert_allclose(angles, angles.mean(), rtol=1e-3)
    longer = algebra.slerp(a, 3 * b, 0.5)
    np.testing.assert_allclose(lengths(longer), 4, rtol=1e-5)
    np.testing.assert_allclose(longer / 4, way[3:4] / 2, atol=1e-5)


def test_slerp_between_a_vector_and_itself(vectors: np.ndarray) -> None:
    np.testing.assert_allclose(algebra.slerp(vectors, vectors, 0.3), vectors, atol=1e-5)
    np.testing.assert_allclose(algebra.slerp(vectors, 1.0001 * vectors, 0.5), 1.00005 * vectors, atol=1e-5)


def test_what_is_projected_out_is_gone(vectors: np.ndarray, directions: np.ndarray) -> None:
    left = np.asarray(algebra.project_out(vectors, directions))
    cosines = left @ directions.T / (lengths(left)[:, None] * lengths(directions))
    np.testing.assert_allclose(cosines, 0, atol=1e-6)
    np.testing.assert_allclose(algebra.project_out(left, directions), left, atol=1e-6)


def test_what_is_kept_is_all_that_is_in_the_span(vectors: np.ndarray, directions: np.ndarray) -> None:
    """Against least squares in float64."""
    kept = np.asarray(algebra.keep(vectors, directions))
    coefficients = np.linalg.lstsq(directions[:2].T, vectors.T.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(kept, (directions[:2].T @ coefficients).T, atol=2e-6)
    np.testing.assert_allclose(algebra.keep(kept, directions), kept, atol=1e-6)
    left = algebra.project_out(vectors, directions)
    both = algebra.share_kept(vectors, kept) + algebra.share_kept(vectors, left)
    np.testing.assert_allclose(both, 1, atol=1e-6)


def test_an_analogy_is_a_sum(vectors: np.ndarray) -> None:
    found = algebra.analogy(vectors[:1], vectors[1:2], vectors[2:3])
    np.testing.assert_allclose(found, vectors[:1] - vectors[1:2] + vectors[2:3], atol=1e-6)
    np.testing.assert_allclose(algebra.analogy(vectors, vectors[:1], vectors[:1]), vectors, atol=1e-6)
