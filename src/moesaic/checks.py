"""What configs check about themselves: each check raises UsageError with the fact, the number and what is allowed."""

import math

from moesaic.errors import UsageError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def require_seed(seed: int) -> None:
    require(0 <= seed < 2**63, f"seed is {seed}; it must lie between 0 and 2^63 - 1")


def require_positive(config: object, *names: str) -> None:
    """Fields that are None pass: they are switched off."""
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 < value < math.inf, f"{name} is {value}; it must be a number above 0")


def require_not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value < math.inf, f"{name} is {value}; it must be a number, 0 or above")


def require_between(config: object, low: float, high: float, *names: str) -> None:
    """Both bounds are allowed. Fields that are None pass: they are switched off."""
    for name in names:
        value = getattr(config, name)
        require(value is None or low <= value <= high, f"{name} is {value}; it must lie between {low:g} and {high:g}")
