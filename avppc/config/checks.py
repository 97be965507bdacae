"""Checks shared by the configurations; each names the field, what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises ValueError unless value is one of the allowed ones."""
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raises TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raises TypeError unless value is an int (not a bool), ValueError unless minimum <= value <= maximum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    _check_range(name, value, minimum, maximum)


def check_number(name: str, value: object, minimum: float, maximum: float | None = None) -> None:
    """Raises TypeError unless value is a real number, ValueError unless it is finite and within the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):  # an int may be too large for isfinite
        raise ValueError(f"{name} must be finite, got {value}")
    _check_range(name, value, minimum, maximum)


def _check_range(name: str, value: float, minimum: float, maximum: float | None) -> None:
    if value < minimum or (maximum is not None and value > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
