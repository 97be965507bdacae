"""Checks of arguments and settings; each error names the argument, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import typing
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_SEED = (1 << 63) - 1
"""The largest seed of a run that every generator takes."""
MAX_THREADS = 4096
"""The most threads: asking for more than the system allows can end the process without a message."""

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises ValueError unless value equals one of the allowed ones and has its type."""
    choices = list(allowed)
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_choices(name: str, values: Sequence[object], allowed: Iterable[object]) -> None:
    """Raises ValueError unless there is at least one value, and each is one of the allowed ones."""
    choices = list(allowed)
    if not values:
        raise ValueError(f"{name} must name at least one of {', '.join(map(str, choices))}")
    for value in values:
        check_choice(name, value, choices)


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
    """Makes a Path of a text where a field is to have one.

    Raises TypeError if a field is not the text, path, tuple, truth value or configuration that its annotation says, and
    ValueError if it is none of the choices that a Literal allows.

    Numbers have checks of their own, which check their ranges as well.
    """
    cls: Any = type(config)
    kinds_of, choices_of = _allowed_in_fields(cls)
    for name, (kinds, words) in kinds_of.items():
        value = getattr(config, name)
        if isinstance(value, str) and Path in kinds and str not in kinds:  # as people write it in Python
            check_path(name, value)
            value = Path(value)
            object.__setattr__(config, name, value)
        if not isinstance(value, kinds):
            raise TypeError(f"{name} must be {words}, got {type(value).__name__} {value!r}")
    for name, choices in choices_of.items():
        check_choice(name, getattr(config, name), choices)


_WORDS = {bool: "True or False", str: "a str", Path: "a pathlib.Path", tuple: "a tuple", type(None): "None"}


@functools.cache
def _allowed_in_fields(cls: Any) -> tuple[dict[str, tuple[tuple[type[Any], ...], str]], dict[str, tuple[Any, ...]]]:
    """Allowed types of each field whose annotation is of these types alone, and how an error says so; choices of each
    whose annotation is a Literal."""
    kinds_of, choices_of = {}, {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is typing.Literal:
            choices_of[name] = typing.get_args(hint)
            continue
        parts = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        kinds = tuple(typing.get_origin(part) or part for part in parts)
        if all(kind in _WORDS or dataclasses.is_dataclass(kind) for kind in kinds):
            kinds_of[name] = kinds, " or ".join(_WORDS.get(kind, f"a {kind.__name__}") for kind in kinds)
    return kinds_of, choices_of


def check_offsets(name: str, offsets: Sequence[int]) -> None:
    """Raises TypeError or ValueError unless offsets are different integers from 1 on; there may be none."""
    if not isinstance(offsets, (list, tuple)):
        raise TypeError(f"{name} must be a sequence of integers, got {offsets!r}")
    for offset in offsets:
        check_integer(name, offset, 1, 10_000)
    if len(set(offsets)) < len(offsets):
        raise ValueError(f"{name} must be different, got {tuple(offsets)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as errors name it, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> Tensor:
    """The value; raises TypeError unless it is a dense tensor, whose elements lie at strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense torch.Tensor, got {layout}")
    return value


def check_device(name: str, value: object) -> torch.device:
    """The device; raises TypeError or ValueError unless it is one that torch knows, and for CUDA has."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name} must be a torch.device or its name, got {type(value).__name__}")
    try:
        device = torch.device(value)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} must be a device such as 'cpu' or 'cuda:1', got {value!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name} is {str(value)!r}, but torch finds no CUDA GPU here")
    return device


def without_autocast(value: Tensor) -> AbstractContextManager[Any]:
    """A context in which products run in the dtypes they come in, on the device of value."""
    kind = value.device.type
    return torch.autocast(kind, enabled=False) if is_autocast_on(kind) else nullcontext()


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for such devices."""
    # Devices without autocast, such as meta, must not be asked whether it is on. Before torch 2.12 torch.compile cannot
    # trace the question whether a device has it, so cpu and cuda are named.
    has_autocast = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def product_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which products take the tensor: autocast's where it is on, as for torch.matmul; float64 stays."""
    kind = value.device.type
    castable = value.dtype in _AUTOCAST_DTYPES and is_autocast_on(kind)
    return torch.get_autocast_dtype(kind) if castable else value.dtype


def check_like_module(name: str, value: object, weight: Tensor) -> None:
    """Raises unless value has the device of a module's weight and, unless autocast makes them alike, its dtype.

    Call it inside that module's forward: elsewhere a sharded weight may be stored in another dtype, on another device.
    What is no tensor of floating point numbers is left to other checks.
    """
    if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
        return
    if value.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like the module, got {value.device}")
    if value.dtype != weight.dtype and product_dtype(value) != product_dtype(weight):
        wanted, got = dtype_name(weight.dtype), dtype_name(value.dtype)
        raise TypeError(f"{name} must have dtype {wanted} like the module where there is no autocast, got {got}")


def read_share(name: str, text: str) -> tuple[int, int]:
    """(i, n) of a share of the work "i/n", all of it for ""; raises ValueError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text or "0/1")
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f'{name} must be "i/n" with i from 0 to n - 1, got {text!r}')
    return int(match[1]), int(match[2])
