"""The paper's own numbers (arXiv 2305.12716), in percent but for FID, to stand beside ours."""

from dataclasses import dataclass

from sdipc_jax.evaluate.tables import Estimate, Table

Numbers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Published:
    """A table of the paper.

    Attributes:
        number: in the paper.
        title: what it compares.
        columns: that it has, the others are ours alone.
        rows: by name.
    """

    number: int
    title: str
    columns: tuple[str, ...]
    rows: Numbers


def _rows(columns: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> Numbers:
    return {name: dict(zip(columns, values, strict=True)) for name, values in rows.items()}


def _table(number: int, title: str, columns: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> Published:
    return Published(number, title, columns, _rows(columns, rows))


_LIKENESS = ("DINO", "CLIP-I", "CLIP-T")

SPACES = _table(
    1,
    "Zero-shot classification and retrieval in C-space and T-space",
    ("Acc@1", "Acc@5", "TR@1", "TR@5", "IR@1", "IR@5"),
    {
        "C-space": (71.41, 91.78, 74.58, 92.98, 55.54, 82.39),
        "T-space": (69.48, 90.62, 71.62, 92.06, 54.82, 82.20),
    },
)
VARIATION = _table(
    2,
    "Variations",
    ("FID", "CLIP-Score"),
    {"SD w/ Text": (23.65, 70.15), "SD-R": (19.86, 82.59), "SD-IPC": (24.78, 73.57)},
)
CUSTOMISE = _table(
    3,
    "Customising",
    _LIKENESS,
    {
        "DreamBooth": (60.11, 77.78, 25.81),
        "Textual Inversion": (25.11, 62.44, 29.53),
        "Custom Diffusion": (39.67, 68.37, 30.90),
        "SD-IPC-CT": (50.25, 74.59, 28.14),
    },
)
EDIT = _table(4, "Editing", ("CLIP-T",), {"SD-IPC": (26.84,), "SD-IPC-FT": (28.69,), "SD-R": (26.01,)})
PLAIN = _table(
    5,
    "Variations by what is tuned",
    _LIKENESS,
    {
        "SD-IPC": (44.60, 77.44, 25.47),
        "FT (C)": (49.11, 76.51, 25.82),
        "FT (U)": (48.53, 79.06, 26.17),
        "FT (both)": (52.03, 79.59, 25.90),
    },
)
EDITED = _table(
    6,
    "Edits by what is tuned",
    _LIKENESS,
    {
        "SD-IPC": (31.09, 68.66, 26.84),
        "FT (C)": (29.10, 67.03, 27.99),
        "FT (U)": (35.21, 69.99, 28.56),
        "FT (both)": (40.28, 71.97, 28.69),
    },
)


def beside(
    published: Published, columns: tuple[str, ...], rows: dict[str, dict[str, Estimate | None]], note: str
) -> Table:
    """Our numbers with the paper's in a column of their own behind each; its rows without ours come last.

    Args:
        columns: ours, in order.
        rows: our rows, in order, and what they have of the columns.
    """
    heads: list[str] = []
    for column in columns:
        heads += [column, f"{column}, paper"] if column in published.columns else [column]
    cells = []
    for name in dict.fromkeys((*rows, *published.rows)):
        row: list[Estimate | None] = []
        for column in columns:
            row.append(rows.get(name, {}).get(column))
            if column in published.columns:
                value = published.rows.get(name, {}).get(column)
                row.append(None if value is None else Estimate(value))
        cells.append((name, tuple(row)))
    name = f"table-{published.number}"
    return Table(name, f"Table {published.number}: {published.title}", note, tuple(heads), tuple(cells))
