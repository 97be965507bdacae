"""What every function that takes a tensor asks of it first."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
