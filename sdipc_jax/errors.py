"""Errors that a message says all of: refused input, missing processes, a run that was asked to stop."""

from pathlib import Path


class InputError(ValueError):
    """Refused input: the message is one line that says what was found, what was expected and what to do.

    The command line prints it alone and exits with 2.
    """


class MissingProcessError(RuntimeError):
    """Another process of the job did not come.

    The command line prints the message alone and exits with 75: try again.
    """


class InterruptedRun(RuntimeError):
    """A run stopped on request, with its state saved.

    The command line prints the message alone and exits with 75: the same command goes on.
    """


def printable(path: str | Path) -> str:
    """The path as a message can show it, on one line."""
    return str(path) if str(path).isprintable() else ascii(str(path))
