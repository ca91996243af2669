"""The door of the room: whatever a data set is, read row by row. Nothing is held in memory but a row."""

import re
from collections.abc import Iterable, Sequence

from etils import epath

from sdipc_jax.datasets.folder import CAPTION, open_folder
from sdipc_jax.datasets.lines import JsonLines
from sdipc_jax.datasets.parquet import ParquetFiles
from sdipc_jax.datasets.rows import Source
from sdipc_jax.datasets.tars import Tars
from sdipc_jax.errors import InputError, printable

_LINES = {".jsonl", ".ndjson"}


def open_source(
    source: str | Sequence[str],
    columns: Iterable[str] | None = None,
    *,
    captions: bool = False,
    setting: str = "source",
) -> Source:
    """A data set.

    Args:
        source: paths, in which `*` and `{00..07}` stand for several.
        columns: those that are asked for; the others need not be read. All if None.
        captions: whether the texts beside a folder's pictures are read also where no column asks for them.
        setting: what errors call the source.

    Raises:
        InputError: there is none, or of no kind that is known here.
    """
    names = (source,) if isinstance(source, str) else source
    paths = [path for name in names for path in _expand(name, setting)]
    asked = None if columns is None else frozenset(columns)
    suffixes = {path.suffix.lower() for path in paths}
    if len(paths) == 1 and paths[0].is_dir():
        return open_folder(paths[0], captions or CAPTION in (asked or ()))
    if suffixes <= _LINES:
        return JsonLines(paths)
    if suffixes == {".tar"}:
        return Tars(paths, asked)
    if suffixes == {".parquet"}:
        return ParquetFiles(paths, asked)
    raise InputError(
        f"{setting} is {printable(names[0])}, expected a folder, .jsonl files, .tar files that are not compressed, or "
        ".parquet files: name one"
    )


def _expand(name: str, setting: str) -> list[epath.Path]:
    """The paths that a name with `{00..07}` and `*` stands for."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match:
        first, last = match.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        parts = (name[: match.start()] + number + name[match.end() :] for number in numbers)
        return [path for part in parts for path in _expand(part, setting)]
    try:
        path = epath.Path(name)
        found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path][: path.exists()]
    except Exception as error:  # What back ends of object stores raise; etils says which package one takes.
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{setting} is {printable(name)}, which cannot be opened ({reason}), expected a path here, or gs:// or "
            "s3:// with pip install 'etils[epath-gcs]' or 'etils[epath-s3]'"
        ) from None
    if not found:
        raise InputError(f"{setting} is {printable(name)}, but nothing is there: check the path")
    return found
