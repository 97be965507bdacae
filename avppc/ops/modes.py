"""What torch has under way around a call: tracing, transforms, recording, modes; and what an operator may then do.

An operator of our own has the derivatives of one backward pass, no others: where anything else is asked for, plain
torch must take its place, or the call must be refused, since torch itself would take the missing ones for zeros. And
the small tensors that calls share are made, kept and read only where no mode would take part in their making.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from avppc.ops import _library

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_MOST_KEPT = 64  # constants of a kind; further ones are made in each call: none is dropped, a CUDA graph may read it
_kept: dict[str, dict[Hashable, Any]] = {}
_T = TypeVar("_T")


def plain_torch_alone(*inputs: Tensor | None) -> str | None:
    """What is under way that plain torch alone can do, or would lose derivatives without it; None if nothing is."""
    if (recording := _recording()) is not None:
        return recording
    # also those that torch.compile traces: it drops the backward of an autograd function
    return "torch.func transforms" if _transforms_are_active() else _forward_mode(inputs)


def is_plain_cpu_call(*inputs: object) -> bool:
    """Whether the inputs are plain tensors on the CPU, in a call that nothing but autograd's backward looks into.

    So nothing traces, records, transforms or intercepts it, there is no autocast and no forward-mode derivative. Small
    losses ask this first, instead of all else that may be under way.
    """
    if torch.compiler.is_compiling():
        return False
    for value in inputs:
        if type(value) not in (Tensor, Parameter) or not value.is_cpu:  # type: ignore[attr-defined]  # it is a Tensor
            return False
    return (
        forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and torch._ops._get_dispatch_mode_pre_dispatch(_PROXY) is None
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


def derivative_of(*inputs: Tensor | None) -> str | None:
    """The part of `plain_torch_alone` that differentiates the call itself: no batching, and no record made of it."""
    return "derivatives by torch.func" if _derivatives_are_active() else _forward_mode(inputs)


def _forward_mode(inputs: tuple[Tensor | None, ...]) -> str | None:
    # Read in the trace, so that torch.compile asks before each later call whether it is still so.
    if forward_ad._current_level < 0:
        return None
    # torch.compile cannot say, while it traces, whether its inputs have tangents
    if torch.compiler.is_compiling() or any(
        value is not None and forward_ad.unpack_dual(value).tangent is not None for value in inputs
    ):
        return "forward-mode derivatives"
    return None


def _recording() -> str | None:
    """What records operators, to differentiate them later; torch.compile does not count, which differentiates first."""
    if _is_exporting():
        return "gradients in torch.export"
    if torch.compiler.is_compiling():
        return None
    modes = torch._C._get_dispatch_mode(_PROXY), torch._ops._get_dispatch_mode_pre_dispatch(_PROXY)
    if modes != (None, None):
        return "gradients in make_fx"
    if torch._C._get_tracing_state() is not None:
        return "gradients in torch.jit.trace"
    return None


def is_differentiated(*inputs: Tensor) -> bool:
    """Whether derivatives of any kind are asked of a function of these: for operators that have none at all."""
    recorded = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
    return recorded or plain_torch_alone(*inputs) is not None


def refuse_second_derivative(function: str, remedy: str) -> None:
    """Raises RuntimeError in a backward that is itself to be differentiated.

    It must be asked: torch.autograd.function.once_differentiable says nothing where the upstream gradient requires no
    gradient, as that of a loss.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(f"{function} has no second derivative; {remedy}")


@_library.constant_when_compiled
def _is_exporting() -> bool:
    """What torch answers outside the trace: before torch 2.13 torch.compile, tracing the question, took it for true."""
    return torch.compiler.is_exporting()


@_library.constant_when_compiled
def _transforms_are_active() -> bool:
    """Whether a transform of torch.func is being run, or traced by torch.compile."""
    return torch._C._are_functorch_transforms_active()


@_library.constant_when_compiled
def _derivatives_are_active() -> bool:
    """Whether one of them differentiates: vmap alone is served by the operators themselves."""
    functorch = torch._C._functorch
    differentiating = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(layer.key() in differentiating for layer in functorch.get_interpreter_stack() or ())


def constant(kind: str, key: Hashable, make: Callable[[], _T], like: Tensor) -> _T:
    """The tensor or table kept under kind and key; the first call makes it by make(). Nobody may write into it.

    To make it anew takes longer than a small loss; and on a GPU a tensor made from numbers must also be copied to the
    device, which CUDA graphs cannot capture.

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
        and type(like) in (Tensor, Parameter)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )
