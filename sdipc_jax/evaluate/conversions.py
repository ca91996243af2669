"""What takes pictures' vectors to the states of their captions, side by side, with no picture generated."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.text_tower import TextTower
from sdipc_jax.errors import InputError
from sdipc_jax.evaluate.metrics import cosines, ranks
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.prompts.calibration import (
    FEWEST_PICTURES,
    caption_states,
    caption_vectors,
    default_ridge,
    picture_vectors,
)
from sdipc_jax.prompts.projection import truncated_pinv
from sdipc_jax.prompts.ridge import Vectors, explained, fit, unit

FEWEST_COMPARED = 10
_COLUMNS = ("cosine", "R^2", "R@1", "R@5")
# From joint vectors to states of any length.
_Map = Callable[[Vectors], Vectors]


def compare(
    bundle: Bundle,
    tower: TextTower,
    features: Float[np.ndarray, "N D_image"],
    texts: Sequence[str],
    captions: Sequence[str],
    *,
    cutoff: float,
    ridge: float | None = None,
) -> Table:
    """Measures the inverse, its relatives and the fitted map on captioned pictures.

    Where there are enough pictures, every second one is left to the mean shift, and all are measured on the others.

    Args:
        features: the pictures', as `encode_images` gives them.
        texts: their captions.
        captions: what the map is fitted to.
        cutoff: of the inverse; Tikhonov's constant is its square, which halves what the cut-off begins to leave out.
        ridge: of the map; its default if None.

    Raises:
        InputError: there are fewer than ten pictures.
    """
    if len(texts) < FEWEST_COMPARED:
        raise InputError(f"found {len(texts)} pictures to compare on, expected at least {FEWEST_COMPARED}: add some")
    ridge = default_ridge(bundle.config) if ridge is None else ridge
    names, truth = np.unique(np.asarray(texts, object).astype(str), return_inverse=True)
    states, widths = caption_states(bundle, names.tolist())
    fitted = fit(caption_vectors(tower, captions), caption_states(bundle, captions)[0], ridge, widths)
    u, targets = unit(picture_vectors(bundle, features)), states[:, 0].astype(np.float64)
    shifts = len(u) >= 2 * FEWEST_PICTURES
    own = np.arange(len(u)) % 2 == 1 if shifts else np.ones(len(u), bool)
    mean = u[~own].mean(axis=0) if shifts else None

    maps: dict[str, _Map] = {}
    note = (
        f"{int(own.sum())} pictures, each against {len(names)} captions; ridge {ridge:g}, fitted to {len(captions)}. "
    )
    projection = tower.projection.astype(np.float64)
    if projection.shape[0] == targets.shape[1]:
        inverse = np.asarray(truncated_pinv(projection, cutoff))
        gram = projection.T @ projection + cutoff**2 * np.eye(projection.shape[1])
        matrices = {
            "raw inverse": np.asarray(truncated_pinv(projection, 0.0)),
            f"inverse, cut-off {cutoff:g}": inverse,
            "Tikhonov": np.linalg.solve(gram, projection.T),
        }
        maps |= {name: partial(_times, matrix) for name, matrix in matrices.items()}
        if mean is not None:
            maps["inverse, mean shift"] = lambda joint: (joint - mean + fitted.centre) @ inverse
        if not bundle.config.inverse_reaches:
            note += "The UNet reads other states than the inverse leads to. "
    else:
        note += "The UNet's states are of another width than the CLIP's, so that there is no inverse. "
    maps["ridge"] = lambda joint: fitted.intercept[0] + (joint - fitted.centre) @ fitted.matrix[0]
    if mean is not None:
        maps["ridge, mean shift"] = lambda joint: fitted.intercept[0] + (joint - mean) @ fitted.matrix[0]
        gap = float(np.linalg.norm(mean - fitted.centre))
        note += f"The means of pictures and captions are {gap:.3f} apart. "
    note += "Vectors have the length of an average state. 95% bootstrap intervals over pictures."

    length = np.linalg.norm(targets, axis=1).mean()
    rows = []
    for name, each in maps.items():
        found = length * unit(each(u[own]))
        rank = ranks(unit(found) @ unit(targets).T, truth[own])
        r2 = Estimate(explained(found, targets[truth[own]]))
        columns = (cosines(found, targets[truth[own]]), (rank < 1) * 1.0, (rank < 5) * 1.0)
        cosine, first, fifth = (Estimate.of_mean(values[None]) for values in columns)
        rows.append((name, (cosine, r2, first, fifth)))
    return Table("conversions", "Pictures' vectors and their captions' states", note, _COLUMNS, tuple(rows))


def _times(matrix: Float[np.ndarray, "D_joint D_text"], joint: Vectors) -> Vectors:
    return joint @ matrix
