"""Settings that must lie within bounds: one wording for all of them."""

import math

from .errors import DAVAEError


def require(setting: str, value: object, fits: bool, expected: str) -> None:
    """Raise DAVAEError unless a setting fits.

    Args:
        setting: its name on the command line, without the dashes.
        value: what was given.
        fits: whether it is as expected; a comparison with what is no number is false.
        expected: what follows "must be".
    """
    if not fits:
        raise DAVAEError(f"--{setting} must be {expected}, got {value}")


def share(setting: str, value: float) -> None:
    """Raise DAVAEError unless a setting is a share."""
    require(setting, value, 0 <= value <= 1, "from 0 to 1")


def above_0(setting: str, value: float) -> None:
    """Raise DAVAEError unless a setting is a finite number above 0."""
    require(setting, value, 0 < value < math.inf, "above 0 and finite")


def at_least_0(setting: str, value: float) -> None:
    """Raise DAVAEError unless a setting is a finite number of at least 0."""
    require(setting, value, 0 <= value < math.inf, "at least 0 and finite")
