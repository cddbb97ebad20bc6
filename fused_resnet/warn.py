"""The one kind of warning that this package gives."""

import warnings


class FusedResNetWarning(UserWarning):
    """Something ran otherwise than asked for or expected; the message says what and why."""


def warn(message: str, stacklevel: int = 2) -> None:
    """Give a `FusedResNetWarning`, which points ``stacklevel`` calls above the caller."""
    warnings.warn(message, FusedResNetWarning, stacklevel=stacklevel + 1)
