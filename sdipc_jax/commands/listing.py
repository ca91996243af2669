"""What `sdipc --help` says, and how every page of help is laid out. Imports nothing that takes time."""

import shutil
import textwrap
from collections.abc import Iterable

_WIDEST, _COLUMN = 110, 26


def pages(summaries: Iterable[tuple[str, str]]) -> str:
    """The page of all commands, or of some."""
    rows = "\n".join(row(command, text) for command, text in summaries)
    more = "`sdipc COMMAND --help` tells a command's options, `sdipc --version` which version this is."
    return "\n\n".join(["usage: sdipc COMMAND [OPTIONS]", "Pictures as prompts for Stable Diffusion.", rows, more])


def row(left: str, text: str) -> str:
    """A line or more: something, and what it is."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = textwrap.wrap(text, max(width - _COLUMN, 30), break_on_hyphens=False, break_long_words=False)
    left = f"  {left}"
    if len(left) + 2 > _COLUMN:
        lines = [left, *(" " * _COLUMN + line for line in lines)]
    else:
        lines = [(left if number == 0 else "").ljust(_COLUMN) + line for number, line in enumerate(lines)]
    return "\n".join(lines)
