"""How far two arrays are apart."""

import numpy as np


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over norm of the expected, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
