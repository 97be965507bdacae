"""Checks shared by the configurations; each error names the field, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_SEED = (1 << 63) - 1
"""The largest seed of a run that every generator takes."""
MAX_THREADS = 4096
"""The most threads: asking for more than the system allows can end the process without a message."""


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises ValueError unless value equals one of the allowed ones and has its type."""
    choices = list(allowed)
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
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


def check_path(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless value is a path that a file can have."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path of characters, got {type(text).__name__}")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be a path that this system can write, got {text!r}") from error
    if b"\0" in encoded:
        raise ValueError(f"{name} must be a path without a zero byte, got {text!r}")


def check_types(config: Any) -> None:
    """Raises TypeError if a field is not the text, path, tuple, truth value or configuration that its annotation says.

    Numbers and choices have checks of their own, which check their values as well.
    """
    cls: Any = type(config)
    for name, (kinds, words) in _kinds_of_fields(cls).items():
        value = getattr(config, name)
        if not isinstance(value, kinds):
            raise TypeError(f"{name} must be {words}, got {type(value).__name__} {value!r}")


_WORDS = {bool: "True or False", str: "a str", Path: "a pathlib.Path", tuple: "a tuple", type(None): "None"}


@functools.cache
def _kinds_of_fields(cls: Any) -> dict[str, tuple[tuple[type[Any], ...], str]]:
    """Allowed types of each field whose annotation is of these types alone, and how an error says so."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        parts = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        kinds = tuple(typing.get_origin(part) or part for part in parts)
        if all(kind in _WORDS or dataclasses.is_dataclass(kind) for kind in kinds):
            found[name] = kinds, " or ".join(_WORDS.get(kind, f"a {kind.__name__}") for kind in kinds)
    return found
