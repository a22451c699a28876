"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Bad input, described in one line: what, where (file or row) and the remedy."""
