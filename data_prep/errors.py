"""The one exception for bad input: its message names the file, the row or field, and the remedy."""


class InputError(ValueError):
    """Something the user gave is unusable. Commands print the message without a traceback and exit with 2."""


class PassingError(InputError):
    """A fault of the disk or the machine, not of the input: the same command may succeed later."""
