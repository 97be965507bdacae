"""bilinear_info_nce by Triton's kernels: the operators, their derivatives and shapes.

Triton is imported when an operator first runs. Forward and backward are one operator each, so that torch.compile sees
one node and leaves the launches inside it alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.info_nce.autograd import backward_fake, rows_fake, solve_rows
from avppc.ops.info_nce.problem import Problem

_PROBLEM = (
    "Tensor contexts, Tensor targets, Tensor? weights, Tensor pairs, Tensor scale, SymInt positive_offset, "
    "Tensor? context_ids, Tensor? target_ids, bool symmetric"
)
_SAVED = "Tensor row_lse, Tensor column_lse, Tensor queries"


def info_nce_triton_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Losses [K, N], differentiable, and whether each positive beats every negative [K, N]."""
    return solve_rows("bilinear_info_nce", "triton", "info_nce_triton", problem)


def _launcher(name: str, module: str) -> Any:
    def call(*inputs: Any) -> Any:
        device = inputs[0].device
        reason = _library.triton_missing_reason(device.type, device.index)
        if reason is not None:
            raise RuntimeError(f"avppc::{name} cannot run on {device}: {reason}")
        with torch.no_grad():
            return getattr(importlib.import_module(f"avppc.ops.info_nce.triton.{module}"), name)(*inputs)

    return call


def _rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = Problem(*inputs)
    shape = (0,) if problem.weights is None else (problem.tasks, problem.rows, problem.targets.shape[2])
    return *rows_fake(*inputs), problem.contexts.new_empty(shape)


_operators = torch.library.Library("avppc", "FRAGMENT")
_operators.define(f"info_nce_triton({_PROBLEM}) -> (Tensor rows, Tensor correct, {_SAVED})")
_operators.define(
    f"info_nce_triton_backward({_PROBLEM}, {_SAVED}, Tensor drows, "
    "bool need_contexts, bool need_targets, bool need_weights, bool need_scale) -> "
    "(Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)"
)
for _name, _module, _fake in (
    ("info_nce_triton", "forward", _rows_fake),
    ("info_nce_triton_backward", "backward", backward_fake),
):
    for _device in ("CUDA", "CPU"):
        _operators.impl(_name, _launcher(_name, _module), _device)
    torch.library.register_fake(f"avppc::{_name}", _fake, lib=_operators)
