"""Arguments that nobody should pass, and the only things that a public function may do with them.

A call returns a result that keeps the promise of its docstring, or raises a plain ValueError or TypeError whose text
names an argument. It never crashes, never lets an error of its insides out, and leaves what it was given as it was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

REFUSED = object()
"""What `call` gives where the arguments were refused."""

EXAMPLES = int(os.environ.get("AVPPC_EXAMPLES", "1"))
"""How many times the usual number of examples: 1 in the suite."""


def examples(count: int) -> settings:
    """Settings of a property: the same examples each time, more of them with AVPPC_EXAMPLES."""
    return settings(max_examples=count * EXAMPLES, deadline=None, derandomize=EXAMPLES == 1)


def call(function: Callable[..., Any], arguments: Mapping[str, Any], names: Collection[str] = ()) -> Any:
    """The function's result, or REFUSED; fails where it does what it must not.

    Args:
        names: what an error may name beside the arguments.
    """
    before = {name: _picture(value) for name, value in arguments.items()}
    result: Any = REFUSED
    refusal: Exception | None = None
    try:
        result = function(**arguments)
    except (ValueError, TypeError) as error:
        refusal = error
    except OSError as error:  # about a path: the system's, which holds it, or our own, whose text does
        assert error.filename is not None or "there is no" in str(error)  # noqa: PT017 - one way of refusing
    if refusal is not None:
        kind, text = type(refusal).__name__, str(refusal)
        assert type(refusal) in (ValueError, TypeError), f"{kind} is an error of the insides: {text}"
        named = any(re.search(rf"\b{re.escape(name)}\b", text) for name in (*arguments, *names))
        assert named, f"{kind} names no argument: {text}"
    after = {name: _picture(value) for name, value in arguments.items()}
    assert after == before, "the call has changed its arguments"
    return result


def _picture(value: Any) -> Any:
    """What is to be the same before and after a call."""
    if isinstance(value, Tensor):
        facts = (value.dtype, value.device, value.layout, value.requires_grad, value.grad is None)
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized or value.is_nested:
            return facts
        whole = value.detach().clone(memory_format=torch.contiguous_format)
        content = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
        return *facts, value.shape, value.stride(), content
    return repr(value)


WORDLESS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**400),
    *(0.0, -0.0, 0.5, -1.0, 1e39, 1e308, float("nan"), float("inf"), -float("inf"), 1j),
    *(np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), torch.float32, torch.device("cpu")),
    *((), (1,), [], [1], [[1.0]], [[1, 2], [3]], [None], {}, {"a": 1}, {1, 2}, range(3), slice(0, 2), int, len),
)
WORDS = ("", "x", "mean", "auto", "cpp", "\0", "\ud800", "ä" * 300, b"bytes", Path("x"), "../x", "1", "nan")
ARRAYS = (np.ones(3), np.ones((2, 2), np.int16), np.array(["a", "b"]), np.array([None, 1]), np.ones((2, 3))[::-1])


def scalars() -> st.SearchStrategy[Any]:
    """Values that are no tensors: numbers of every kind and size, texts, containers, arrays."""
    return st.sampled_from((*WORDLESS, *WORDS, *ARRAYS)) | st.integers() | st.floats() | st.text(max_size=5)


DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64),
)
SHAPES = ((), (0,), (1,), (3,), (0, 4), (3, 0), (2, 2), (4, 3), (2, 3, 4), (2, 0, 4), (1, 2, 3, 4), (1, 1, 1, 1, 1))


@st.composite
def strange_tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of any dtype, rank, layout and device but those with an accelerator."""
    value = torch.ones(draw(st.sampled_from(SHAPES))).to(draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["plain", "plain", "meta", "sparse", "nested", "quantized", "subclass", "gradient"]))
    if kind == "meta":
        return value.to("meta")
    if kind == "sparse":
        return torch.eye(3).to_sparse()
    if kind == "nested":
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    if kind == "quantized":
        return torch.fake_quantize_per_tensor_affine(torch.ones(2, 2), 0.1, 0, 0, 255)
    if kind == "subclass":
        return torch.nn.Parameter(value, requires_grad=False)
    return value.requires_grad_() if kind == "gradient" and value.is_floating_point() else value


@st.composite
def laid_out(draw: st.DrawFn, value: Tensor) -> Tensor:
    """The same values, as they may lie in memory: whole, in turned order, with gaps, on odd addresses."""
    way = draw(st.sampled_from(["whole", "turned", "gaps", "shifted"]))
    if way == "whole" or value.ndim == 0:
        return value
    if way == "turned":
        order = tuple(reversed(range(value.ndim)))
        return value.permute(order).contiguous().permute(order)
    if way == "gaps":
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), 7).to(value.dtype)
        wide[..., ::2] = value
        return wide[..., ::2]
    longer = torch.empty(value.numel() + 1, dtype=value.dtype)
    longer[1:] = value.reshape(-1)
    return longer[1:].view(value.shape)


def anything() -> st.SearchStrategy[Any]:
    """All of it."""
    return scalars() | strange_tensors()


def near(value: Any) -> st.SearchStrategy[Any]:
    """What is nearly a valid argument: a tensor of another rank, length, dtype or device; or anything at all."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return anything()
    value = value.detach()
    changed = [value[None], value[0], value[:0], value[:1], torch.cat([value, value]), value[..., :0], value[..., :1]]
    changed += [
        value.to("meta"),
        value.to(torch.int32),
        value.to(torch.float64),
        value.to(torch.bool),
        value.flip(0),
        value * 99,
    ]
    return st.sampled_from(changed) | anything()
