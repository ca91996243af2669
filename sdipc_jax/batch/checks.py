"""What can be refused or told of a job's data set before the device is busy."""

import os
from collections.abc import Iterator
from pathlib import Path

from sdipc_jax.batch.items import Reader
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.batch.storage import is_local
from sdipc_jax.datasets.folder import Folder, ImageFolder
from sdipc_jax.datasets.rows import EVERY_ROW, Row, Source, Survey, Wanted, standard_names
from sdipc_jax.errors import InputError, printable
from sdipc_jax.records import name_row

# A job of so many rows, and of so many bytes to be read for them, is looked through.
_CHECKED_ROWS, _CHECKED_BYTES = 10_000, 2**28
_SHOWN_ROWS = 3


def check_apart(source: Source, output: str) -> None:
    """Refuses results among the inputs: the next run would take them for inputs.

    Raises:
        InputError: the output lies in the source.
    """
    if isinstance(source, Folder | ImageFolder) and is_local(source.path):
        folder = Path(source.path).resolve()
        if "://" not in output and Path(output).resolve().is_relative_to(folder):
            raise InputError(
                f"output_dir {printable(output)} lies in the source {printable(os.fspath(source.path))}, expected a "
                "place of its own: choose another"
            )


def check_columns(source: Source, settings: JobSettings) -> None:
    """Refuses a data set whose first row has columns that are no settings, a mistake in every row.

    Raises:
        InputError: with the first such column.
    """
    for name in settings.columns or {}:
        if name not in Row.model_fields:
            raise InputError(
                f"columns names {name!r}, expected one of a row's settings, {', '.join(Row.model_fields)}: correct it"
            )
    first = next(iter(source.rows(Wanted([range(1)]))), None)
    if first is None or first.error is not None or settings.columns is not None:
        return
    unknown = sorted(set(standard_names(first.values).values()) - set(Row.model_fields))
    if unknown:
        split = " (names in archives are split at their first dot)" if "." in unknown[0] else ""
        raise InputError(
            f"the first row has the column {printable(unknown[0])!r}{split}, which is no setting of a row: say with "
            f"`columns` which of {', '.join(map(printable, first.values))} are to be read, such as "
            "`columns: {picture: picture}`"
        )


def rows_that_will_fail(source: Source, survey: Survey, reader: Reader) -> Iterator[str]:
    """A line about those rows of a small job whose texts or sizes will not do, or which cannot be read."""
    if survey.rows > _CHECKED_ROWS or survey.size > _CHECKED_BYTES:
        return
    rows = source.rows(EVERY_ROW)
    bad = [f"{name_row(raw.number, raw.place)}: {problem}" for raw in rows if (problem := reader.check(raw))]
    if bad:
        shown = "; ".join(bad[:_SHOWN_ROWS])
        more = f"; and {len(bad) - _SHOWN_ROWS} more" if len(bad) > _SHOWN_ROWS else ""
        yield f"{len(bad)} of {survey.rows} rows will fail: {shown}{more}"
