"""Results as tables: for people as Markdown, for programs as JSON."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sdipc_jax.evaluate.metrics import Interval, bootstrap_interval


@dataclass(frozen=True)
class Estimate:
    """A number, its 95% interval where there is one, and its value for each seed where there are several."""

    value: float
    interval: Interval | None = None
    by_seed: tuple[float, ...] = ()

    @classmethod
    def of_mean(cls, values: Float[np.ndarray, "S N"]) -> "Estimate":
        """The mean over seeds and pictures; the interval is a bootstrap over pictures, each the mean of its seeds."""
        by_seed = tuple(float(mean) for mean in values.mean(axis=1)) if len(values) > 1 else ()
        by_picture = values.mean(axis=0)
        return cls(float(by_picture.mean()), bootstrap_interval(by_picture), by_seed)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"value": self.value}
        if self.interval is not None:
            found["interval"] = list(self.interval)
        if self.by_seed:
            found["by_seed"] = list(self.by_seed)
        return found

    def to_latex(self) -> str:
        """The number, and its interval in small type."""
        if self.interval is None:
            return _number(self.value)
        low, high = map(_number, self.interval)
        return rf"{_number(self.value)} {{\scriptsize [{low}, {high}]}}"

    def __str__(self) -> str:
        if self.interval is None:
            return _number(self.value)
        low, high = map(_number, self.interval)
        return f"{_number(self.value)} [{low}, {high}]"


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: what JSON calls it.
        title: what people call it.
        note: how the numbers were made.
        columns: above the numbers.
        rows: names and one value a column; None where there is no such number.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Estimate | None, ...]], ...]

    def __getitem__(self, place: tuple[str, str]) -> Estimate:
        """The number of a row and a column, both by name."""
        row, column = place
        found = dict(self.rows)[row][self.columns.index(column)]
        if found is None:
            raise KeyError(place)
        return found

    def to_json(self) -> dict[str, Any]:
        rows = {
            name: {
                column: each.to_json() for column, each in zip(self.columns, values, strict=True) if each is not None
            }
            for name, values in self.rows
        }
        return {"title": self.title, "note": self.note, "rows": rows}

    def to_markdown(self) -> str:
        lines = [
            f"### {self.title}",
            "",
            self.note,
            "",
            "| | " + " | ".join(self.columns) + " |",
            "|---|" + "---|" * len(self.columns),
        ]
        for name, values in self.rows:
            cells = ("-" if value is None else str(value) for value in values)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def to_latex(self) -> str:
        """A table for a paper, with booktabs' rules; intervals in small type."""
        lines = [
            r"\begin{table}",
            rf"\caption{{{_escaped(self.title)}. {_escaped(self.note)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}",
            r"\toprule",
            " & ".join(["", *map(_escaped, self.columns)]) + r" \\",
            r"\midrule",
        ]
        for name, values in self.rows:
            cells = ("--" if value is None else value.to_latex() for value in values)
            lines.append(" & ".join([_escaped(name), *cells]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _escaped(text: str) -> str:
    """What LaTeX would read as a command, as letters.

    >>> print(_escaped("50% of a_b"))
    50\\% of a\\_b
    """
    special = {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"} | {each: rf"\{each}" for each in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)


def _number(value: float) -> str:
    """Three decimals, more where that would hide a small number.

    >>> [_number(value) for value in (0.5, 0.00123, -0.0, 123.456)]
    ['0.500', '0.0012', '0.000', '123.456']
    """
    if value == 0:
        return "0.000"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"
