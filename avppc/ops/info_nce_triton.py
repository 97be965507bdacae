"""bilinear_info_nce by Triton's kernels: the operators, their derivatives, their shapes.

Triton is imported when an operator first runs. One operator each for the forward and the backward, so that
torch.compile sees one node and leaves the launches between alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.info_nce_autograd import FIELDS, backward_fake, distinct, gradients_of, needs_of, refuse_double_backward
from avppc.ops.info_nce_problem import Problem

_PROBLEM = (
    "Tensor contexts, Tensor targets, Tensor? weights, Tensor pairs, Tensor scale, SymInt positive_offset, "
    "Tensor? context_ids, Tensor? target_ids, bool symmetric"
)
_SAVED = "Tensor row_lse, Tensor column_lse, Tensor queries"


def info_nce_triton_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Losses [K, N], differentiable, and whether each positive beats every negative [K, N]."""
    rows, correct = _Rows.apply(*distinct(problem))  # type: ignore[no-untyped-call]  # torch does not annotate it
    return rows, correct


class _Rows(torch.autograd.Function):
    """Losses of rows; the backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        problem = Problem(*inputs)
        rows, correct, row_lse, column_lse, queries = torch.ops.avppc.info_nce_triton(*problem)
        ctx.mark_non_differentiable(correct)
        ctx.settings = problem.positive_offset, problem.symmetric
        tensors = (problem.contexts, problem.targets, problem.weights, problem.pairs, problem.scale)
        ctx.save_for_backward(*tensors, problem.context_ids, problem.target_ids, row_lse, column_lse, queries)
        return rows, correct

    @staticmethod
    def backward(ctx: Any, drows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("triton")
        contexts, targets, weights, pairs, scale, context_ids, target_ids, *saved = ctx.saved_tensors
        offset, symmetric = ctx.settings
        problem = Problem(contexts, targets, weights, pairs, scale, offset, context_ids, target_ids, symmetric)
        needs = needs_of(ctx)
        found = torch.ops.avppc.info_nce_triton_backward(*problem, *saved, drows, *needs)
        wanted = tuple(value if need else None for need, value in zip(needs, found, strict=True))
        return gradients_of(wanted, FIELDS)


def _launcher(name: str, module: str) -> Any:
    def run(*inputs: Any) -> Any:
        device = inputs[0].device
        reason = _library.triton_missing_reason(device.type, device.index)
        if reason is not None:
            raise RuntimeError(f"avppc::{name} cannot run on {device}: {reason}")
        with torch.no_grad():
            return getattr(importlib.import_module(f"avppc.ops.{module}"), name)(*inputs)

    return run


def _rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = Problem(*inputs)
    K, N, M, D = problem.tasks, problem.rows, problem.targets.shape[1], problem.targets.shape[2]
    rows = problem.contexts.new_empty((K, N), dtype=torch.float32)
    row_lse, column_lse = (rows.new_empty(2, K, length) for length in (N, M if problem.symmetric else 0))
    queries = problem.contexts.new_empty((0,) if problem.weights is None else (K, N, D))
    return rows, torch.empty_like(rows), row_lse, column_lse, queries


_operators = torch.library.Library("avppc", "FRAGMENT")
_operators.define(f"info_nce_triton({_PROBLEM}) -> (Tensor rows, Tensor correct, {_SAVED})")
_operators.define(
    f"info_nce_triton_backward({_PROBLEM}, {_SAVED}, Tensor drows, "
    "bool need_contexts, bool need_targets, bool need_weights, bool need_scale) -> "
    "(Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)"
)
for _name, _module, _fake in (
    ("info_nce_triton", "info_nce_triton_launch", _rows_fake),
    ("info_nce_triton_backward", "info_nce_triton_backward", backward_fake),
):
    for _device in ("CUDA", "CPU"):
        _operators.impl(_name, _launcher(_name, _module), _device)
    torch.library.register_fake(f"avppc::{_name}", _fake, lib=_operators)
