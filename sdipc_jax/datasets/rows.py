"""A row of a data set: as it stands there, and as the settings and pictures that it asks for."""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from etils import epath
from pydantic import Field, model_validator

from sdipc_jax.errors import InputError, printable
from sdipc_jax.settings import Finite, Seed, Settings, Side

_Path = Annotated[str, Field(min_length=1)]


class Row(Settings):
    """A row of the data set."""

    picture: _Path | None = None
    """A picture's path, relative to the file that names it."""
    pictures: tuple[_Path, ...] = ()
    """Or several, whose vectors are averaged."""
    weights: tuple[Finite, ...] = ()
    """Of the pictures in that average; as many, and with a sum that is not 0."""
    text: str | None = None
    """What to change (eq. 8)."""
    alpha: Finite | None = None
    """Weight of the text."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    seed: Seed | None = None
    """Gives variation 0 of this seed. Without it the row's id numbers a variation of the job's seed."""
    height: Side | None = None
    """One of the job's sizes."""
    width: Side | None = None
    """One of the job's sizes."""

    @model_validator(mode="after")
    def _pictures_and_weights(self) -> Self:
        if (self.picture is None) != bool(self.pictures):
            raise ValueError("found both or neither of picture and pictures, expected one of them: name the picture")
        if self.weights and len(self.weights) != len(self.names):
            raise ValueError(
                f"found {len(self.weights)} weights for {len(self.names)} pictures, expected as many: correct them"
            )
        if self.weights and not abs(sum(self.weights)) > 1e-6 * sum(map(abs, self.weights)):
            raise ValueError(f"weights are {list(self.weights)}, expected a sum that is not 0: correct them")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The pictures' paths."""
        return self.pictures or (self.picture or "",)


@dataclass(frozen=True)
class Input:
    """A picture, not read yet.

    Attributes:
        name: as the data set names it: the same wherever the data set lies.
        where: its path, or its bytes where the data set holds them.
    """

    name: str
    where: epath.Path | bytes


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in the data set.

    Attributes:
        number: its place in the job, from 0.
        values: its columns, unchecked.
        base: the folder that its paths start from; None where no paths can be read.
        error: why it cannot be read at all.
    """

    number: int
    values: dict[str, Any]
    base: epath.Path | None = None
    error: str | None = None

    def parse(self, columns: dict[str, str] | None) -> tuple[Row, list[Input]]:
        """Its settings and pictures.

        Raises:
            InputError: they are not what a row can hold.
        """
        if self.error is not None:
            raise InputError(self.error)
        values = self.values
        if columns is not None:
            missing = [column for column in columns.values() if column not in values]
            if missing:
                raise InputError(f"found no column {missing[0]!r}, expected one as `columns` says: correct the row")
            values = {name: values[column] for name, column in columns.items()}
        values = {name: value for name, value in values.items() if value is not None}
        single = "picture" in values
        given = [values["picture"]] if single else values.get("pictures")
        pictures = [_picture(value) for value in given] if isinstance(given, list | tuple) else []
        # The schema judges names as they can be shown: those from a disk need not be valid Unicode.
        shown = [printable(name) if isinstance(name, str) else name for name, _ in pictures]
        if pictures:
            values |= {"picture": shown[0]} if single else {"pictures": shown}
        row = Row(**values)
        inputs = []
        for name, data in pictures:
            if data is None and self.base is None:
                raise InputError(f"found the path {name!r}, expected the picture's bytes: correct the row")
            inputs.append(Input(name, _at(self.base, name) if data is None else data))
        return row, inputs


def _picture(value: Any) -> tuple[Any, bytes | None]:
    """The name and the bytes in a column: a path, bytes, or Hugging Face's {bytes, path}."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["path"] or "picture", value["bytes"]
    return ("picture", value) if isinstance(value, bytes) else (value, None)


def _at(base: epath.Path | None, name: str) -> epath.Path:
    return epath.Path(name) if base is None or "://" in name else base / name
