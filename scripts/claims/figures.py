"""The figures of docs/results, from the JSONs alone."""

import io
from pathlib import Path

from claims.results import read, restored
from sdipc_jax.files import write_atomically

# By the JSON: the table, its columns, and what the numbers are with which its rows' names begin.
FIGURES = {"spaces": ("cutoffs", ("R@1", "cosine"), "cut-off, as a share of the largest singular value")}


def draw(folder: Path, checkpoints: tuple[str, ...]) -> None:
    """Draws each figure that there are JSONs for: a panel a column, a line a checkpoint, with intervals."""
    # Slow to import, and only needed here.
    from matplotlib.figure import Figure

    for what, (table, columns, label) in FIGURES.items():
        found = {name: each for name in checkpoints if (each := read(folder, what, name)) is not None}
        if not found:
            continue
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, column in zip(figure.subplots(1, len(columns)), columns, strict=True):
            for name, each in found.items():
                values = restored(each, table)
                numbers = [values[row, column] for row, _ in values.rows]
                places = [float(row.split()[0]) for row, _ in values.rows]
                middle = [number.value for number in numbers]
                errors = [
                    [abs(number.value - (number.interval or (number.value,) * 2)[end]) for number in numbers]
                    for end in (0, 1)
                ]
                axes.errorbar(places, middle, errors, marker="o", capsize=3, label=name)
            axes.set(xlabel=label, ylabel=column)
            axes.grid(alpha=0.3)
            axes.legend()
        stream = io.BytesIO()
        figure.savefig(stream, dpi=100, metadata={"Software": None})
        write_atomically(folder / f"{what}.png", stream.getvalue())
