"""What a run of tuning has learnt: its training losses, and the losses after it, on its own drawings and on others."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from claims.tuned import UNTRAINED, UNTUNED, Values
from sdipc_jax import tuning
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.tuning import TuningSettings

# Noises and timesteps a drawing, the same for every checkpoint.
DRAWS = 8
PROMPTED, CAPTIONED = "under the picture", "under the caption"
# Vectors are made with the checkpoint's own vision tower, deep prompts included, so that the loss begins behind it.
_SETTINGS = TuningSettings(variant="kv", steps=1)


def losses(runs: Mapping[str, Path]) -> Table:
    """What the training losses did: the first and the last quarter of the updates of each run."""
    rows = []
    for name, run in runs.items():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        quarter = max(1, len(lines) // 4)
        cells: list[Estimate | None] = []
        for loss in ("loss_image", "loss_text"):
            values = np.array([line.get(loss, np.nan) for line in lines])
            for part in (values[:quarter], values[-quarter:]):
                cells.append(None if np.isnan(part).any() else Estimate.of_mean(part[None]))
        rows.append((name, tuple(cells)))
    note = (
        "Squared error of what the UNet predicts, under the picture's prompt and under the caption: means of the first "
        "and the last quarter of the updates, first seed. 95% bootstrap intervals over updates."
    )
    columns = ("picture, first", "picture, last", "caption, first", "caption, last")
    return Table("losses", "What the losses did", note, columns, tuple(rows))


def errors(bundle: Bundle, rows: Corpus) -> Values:
    """Eq. 9's two losses of each drawing, without dropout, from noises and timesteps that belong to its place."""
    pictures, captions = list(rows.pictures), rows.caption.tolist()
    cache = tuning.make_cache(bundle, _SETTINGS, pictures, captions, batch_size=8)
    state = tuning.init(bundle, _SETTINGS)
    found = []
    for number in range(len(rows)):
        batch = cache.batch([number] * DRAWS) | {"rows": np.arange(number * DRAWS, (number + 1) * DRAWS)}
        found.append(_each(state, batch))
    image, text = np.asarray(found, np.float32).T
    return {PROMPTED: image, CAPTIONED: text}


def held(found: Mapping[str, Mapping[str, Sequence[Values]]]) -> Table:
    """Losses on drawings that were tuned on and on others.

    Args:
        found: by what was tuned on, and then by the run, UNTUNED among them: the errors of both kinds of drawings.
    """
    rows = []
    for domain, runs in found.items():
        before = [values for part in runs[UNTUNED] for values in part.values()]
        for name, parts in runs.items():
            values = [values for part in parts for values in part.values()]
            gains = values if name == UNTUNED else [one - other for one, other in zip(values, before, strict=True)]
            called = f"{domain}, {name}" if name in (UNTUNED, UNTRAINED) else name
            difference = "" if name == UNTUNED else f" - {UNTUNED}"
            rows.append((called + difference, tuple(Estimate.of_mean(each[None]) for each in gains)))
    note = (
        f"Squared error of what the UNet predicts, {DRAWS} noises and timesteps a drawing, the same for every row. The "
        "rows with a difference are what a run changes of it: where it falls on drawings that were tuned on and not on "
        "others, the run overfits. 95% bootstrap intervals over pictures."
    )
    columns = tuple(f"{kind}, {loss}" for kind in ("tuned on", "others") for loss in (PROMPTED, CAPTIONED))
    return Table("held", "Losses on drawings tuned on and on others", note, columns, tuple(rows))


@jax.jit
def _each(state: tuning.State, batch: Any) -> Float[Array, " 2"]:
    """The two losses of one drawing, its draws side by side."""
    draws = tuning.draw(jax.random.key(0), batch["rows"], state.frozen, state.settings, batch)
    _, parts = tuning.loss(state.params, state.frozen, state.settings, batch, draws)
    return jnp.stack([parts["loss_image"], parts["loss_text"]])
