"""The one exception for bad input: its message names the file, the row or field, and the remedy."""


class InputError(ValueError):
    """Something the user gave is unusable. Commands print the message without a traceback and exit with 2."""
