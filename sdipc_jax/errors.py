"""Errors that a message says all of: refused input, missing processes, a run that was asked to stop."""

import sys
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


class MissingPackageError(ValueError):
    """A package that is not installed by default is needed; the message says which, and how to install it."""


# A line of a message that holds something found is never longer than a screen.
_LONGEST = 300


def shortened(text: str, longest: int = _LONGEST) -> str:
    """A text cut in the middle, so that both of its ends can be seen.

    >>> shortened("abcdefghijklmnopqrstuvwxyz", 9)
    'abcd...yz'
    """
    if len(text) <= longest:
        return text
    end = (longest - 3) // 3
    return f"{text[: longest - 3 - end]}...{text[len(text) - end :]}"


def one_line(error: BaseException) -> str:
    """What an error says, on one line.

    >>> one_line(ValueError("first\\n  second"))
    'first second'
    """
    return " ".join(str(error).split())


def printable(path: str | Path) -> str:
    """The path as a message can show it, on one line, in what the terminal can say."""
    text = str(path)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ascii(text)
    return text if text.isprintable() else ascii(text)
