"""The one error that means "your input is at fault"."""


class InputError(ValueError):
    """Refused input: the message is one line that says what was found, what was expected and what to do.

    The command line prints it alone and exits with 2.
    """
