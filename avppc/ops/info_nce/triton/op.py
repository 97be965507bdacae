"""bilinear_info_nce and moment_info_nce by Triton's kernels: the operators, their derivatives and shapes.

Triton is imported when an operator first runs. Forward and backward are one operator each, so that torch.compile sees
one node and leaves the launches inside it alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.info_nce.autograd import backward_fake, moment_backward_fake, moment_rows_fake, rows_fake, solve_rows
from avppc.ops.info_nce.problem import MomentProblem, Problem

_COMMON = (
    "Tensor contexts, Tensor targets, Tensor? weights, Tensor pairs, Tensor scale, SymInt positive_offset, "
    "Tensor? context_ids, Tensor? target_ids"
)


def info_nce_triton_rows(problem: Problem | MomentProblem) -> tuple[Tensor, Tensor]:
    """Losses [K, N], differentiable, and whether each positive beats every negative [K, N]; of moments [K, N Tc]."""
    if isinstance(problem, Problem):
        return solve_rows("bilinear_info_nce", "triton", "info_nce_triton", problem)
    return solve_rows("moment_info_nce", "triton", "info_nce_moments_triton", problem)


def _launcher(name: str, module: str) -> Any:
    def call(*inputs: Any) -> Any:
        device = inputs[0].device
        reason = _library.triton_missing_reason(device.type, device.index)
        if reason is not None:
            raise RuntimeError(f"avppc::{name} cannot run on {device}: {reason}")
        with torch.no_grad():
            return getattr(importlib.import_module(f"avppc.ops.info_nce.triton.{module}"), name)(*inputs)

    return call


def _queries_fake(problem: Problem | MomentProblem) -> Tensor:
    rows = len(problem.pairs), problem.contexts.shape[1], problem.targets.shape[2]
    return problem.contexts.new_empty((0,) if problem.weights is None else rows)


def _rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return *rows_fake(*inputs), _queries_fake(Problem(*inputs))


def _moment_rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return *moment_rows_fake(*inputs), _queries_fake(MomentProblem(*inputs))


_operators = torch.library.Library("avppc", "FRAGMENT")


_NEEDS = "bool need_contexts, bool need_targets, bool need_weights, bool need_scale"
_GRADIENTS = "(Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)"
for _operator, _modules, _fakes, _rest, _saved in (
    (
        "info_nce_triton",
        ("forward", "backward"),
        (_rows_fake, backward_fake),
        "bool symmetric",
        "Tensor row_lse, Tensor column_lse, Tensor queries",
    ),
    (
        "info_nce_moments_triton",
        ("moments", "moments"),
        (_moment_rows_fake, moment_backward_fake),
        "SymInt context_moments, SymInt target_moments, Tensor candidates, Tensor shifts",
        "Tensor row_lse, Tensor queries",
    ),
):
    _operators.define(f"{_operator}({_COMMON}, {_rest}) -> (Tensor rows, Tensor correct, {_saved})")
    _operators.define(f"{_operator}_backward({_COMMON}, {_rest}, {_saved}, Tensor drows, {_NEEDS}) -> {_GRADIENTS}")
    for _name, _module, _fake in zip((_operator, f"{_operator}_backward"), _modules, _fakes, strict=True):
        for _device in ("CUDA", "CPU"):
            _operators.impl(_name, _launcher(_name, _module), _device)
        torch.library.register_fake(f"avppc::{_name}", _fake, lib=_operators)
