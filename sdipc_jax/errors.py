"""Errors that a message says all of: refused input, and other processes that are missing."""


class InputError(ValueError):
    """Refused input: the message is one line that says what was found, what was expected and what to do.

    The command line prints it alone and exits with 2.
    """


class MissingProcessError(RuntimeError):
    """Another process of the job did not come.

    The command line prints the message alone and exits with 75: try again.
    """
