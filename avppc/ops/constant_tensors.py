"""Small tensors and tables that many calls share: to make them anew takes longer than a small loss.

On a GPU a tensor made from numbers must also be copied to the device, which CUDA graphs cannot capture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

_MOST_KEPT = 64  # of a kind; further ones are made in each call: none is dropped, for a CUDA graph may read it
_kept: dict[str, dict[Hashable, Any]] = {}
_T = TypeVar("_T")


def constant(kind: str, key: Hashable, make: Callable[[], _T], like: Tensor) -> _T:
    """The tensor or table kept under kind and key; the first call makes it by make(). Nobody may write into it.

    `like` is an embedding of the call. If it is not a plain tensor, or if a transform, a mode or the recording of a
    CUDA graph would take part in the making, the value is made for this call alone.
    """
    if not is_plain(like):
        return make()
    kept = _kept.setdefault(kind, {})
    found: _T | None = kept.get(key)
    if found is None:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return make()
        with torch.inference_mode(False):  # a later call may differentiate
            found = make()
        if like.is_cuda:  # wait once: later calls may come on other streams
            torch.cuda.current_stream(like.device).synchronize()
        if len(kept) < _MOST_KEPT:
            kept[key] = found
    return found


def is_plain(like: Tensor) -> bool:
    """Whether the numbers of `like` can be read: no tracing, no transform, no mode and no subclass takes part."""
    return (
        not torch.compiler.is_compiling()
        and type(like) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )
