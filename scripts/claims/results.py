"""Where results lie: a JSON a measurement and checkpoint, from which the pages are written."""

import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.files import write_atomically

RESULTS = Path("docs/results")
Pictures = UInt8[np.ndarray, "N H W 3"]
# Of a sheet's colours: drawings have few, and the repository stays small.
_COLOURS = 128


def save(
    folder: Path,
    what: str,
    checkpoint: str,
    bundle: Bundle,
    corpus: Corpus,
    tables: Sequence[Table],
    sheet: Image.Image | None = None,
    **more: Any,
) -> Path:
    """Writes the tables of a measurement, with what they belong to, and its sheet.

    Args:
        more: what else the pages tell.
    """
    found = {
        "command": f"python {shlex.join(sys.argv)}",
        "checkpoint": checkpoint,
        "digests": digests(bundle.config, None),
        "corpus": corpus.manifest.get("sha256"),
        **more,
        "tables": {table.name: table.to_json() | {"columns": list(table.columns)} for table in tables},
    }
    path = folder / f"{what}-{Path(checkpoint).name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if sheet is not None:
        stream = io.BytesIO()
        sheet.quantize(_COLOURS).save(stream, "PNG", optimize=True)
        write_atomically(path.with_suffix(".png"), stream.getvalue())
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    return path


def read(folder: Path, what: str, checkpoint: str) -> dict[str, Any] | None:
    """What `save` wrote, or None."""
    path = folder / f"{what}-{checkpoint}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def restored(found: Mapping[str, Any], name: str) -> Table:
    """A table from its JSON."""
    table = found["tables"][name]

    def estimate(cell: Any) -> Estimate | None:
        if cell is None:
            return None
        interval = cell.get("interval")
        return Estimate(cell["value"], None if interval is None else (interval[0], interval[1]))

    rows = [
        (row, tuple(estimate(cells.get(column)) for column in table["columns"])) for row, cells in table["rows"].items()
    ]
    return Table(name, table["title"], table["note"], tuple(table["columns"]), tuple(rows))


def kept(path: Path, make: Callable[[], Pictures]) -> Pictures:
    """Pictures from a file, or made and written there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        np.save(stream, make())
        write_atomically(path, stream.getvalue())
    return np.load(path)
