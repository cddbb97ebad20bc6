"""The one kind of warning that this package gives."""


class FusedResNetWarning(UserWarning):
    """Something ran otherwise than asked for or expected; the message says what and why."""
