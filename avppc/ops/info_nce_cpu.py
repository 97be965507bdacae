"""bilinear_info_nce by the compiled operators for CPU tensors: their calls, their derivatives, their shapes.

The mean over sub-tasks and rows is one operator that computes the gradients along with the loss, while each block of
logits is at hand. For any other reduction the gradient by each row's loss is not known before the backward, which
computes the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.info_nce_problem import Problem

_TENSORS = ("contexts", "targets", "weights", "scale")  # what has a gradient
_FIELDS = len(Problem._fields)


def info_nce_cpu_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Losses [K, N], differentiable, and accuracies [K]."""
    rows, correct, _, _ = torch.ops.avppc.info_nce_cpu(*problem)
    return rows, correct.mean(1)


def info_nce_cpu_mean(problem: Problem, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum(shares * task losses), differentiable, task losses [K] and accuracies [K]; shares [K] float32."""
    needs = [value is not None and value.requires_grad for value in _tensors(problem)]
    if not (torch.is_grad_enabled() and any(needs)):
        rows, correct, _, _ = torch.ops.avppc.info_nce_cpu(*problem)
        task_loss = rows.mean(1)
        return (shares * task_loss).sum(), task_loss, correct.mean(1)
    loss, task_loss, accuracy, *_ = torch.ops.avppc.info_nce_cpu_mean(*problem, shares, *needs)
    return loss, task_loss, accuracy


def _tensors(problem: Problem) -> list[Tensor | None]:
    return [getattr(problem, name) for name in _TENSORS]


def _refuse_double_backward(upstream: Tensor) -> None:
    if torch.is_grad_enabled() and type(upstream) is Tensor:  # while torch.compile traces, it is a fake one
        raise RuntimeError(
            "bilinear_info_nce(backend='cpp') has no second derivative; use backend='reference' with create_graph=True"
        )


def _gradients(gradients: dict[str, Tensor | None], inputs: int) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each of an operator's inputs."""
    return tuple(gradients.get(name) for name in Problem._fields) + (None,) * (inputs - _FIELDS)


def _rows_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    problem = Problem(*inputs)
    _, correct, row_lse, column_lse = output
    ctx.mark_non_differentiable(correct, row_lse, column_lse)
    ctx.settings = problem.positive_offset, problem.symmetric
    tensors = (problem.contexts, problem.targets, problem.weights, problem.pairs, problem.scale)
    ctx.save_for_backward(*tensors, problem.context_ids, problem.target_ids, row_lse, column_lse)


def _rows_backward(ctx: Any, drows: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_double_backward(drows)
    contexts, targets, weights, pairs, scale, context_ids, target_ids, row_lse, column_lse = ctx.saved_tensors
    offset, symmetric = ctx.settings
    problem = Problem(contexts, targets, weights, pairs, scale, offset, context_ids, target_ids, symmetric)
    needs = [ctx.needs_input_grad[Problem._fields.index(name)] for name in _TENSORS]
    found = torch.ops.avppc.info_nce_cpu_backward(*problem, row_lse, column_lse, drows, *needs)
    gradients = {name: value for name, need, value in zip(_TENSORS, needs, found, strict=True) if need}
    return _gradients(gradients, _FIELDS)


def _mean_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.inputs = len(inputs)
    ctx.needs = inputs[-len(_TENSORS) :]
    ctx.save_for_backward(*others[-len(_TENSORS) :])


def _mean_backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _refuse_double_backward(dloss)
    # loss.backward() asks for 1 times the gradients: spare the copy
    as_they_are = type(dloss) is Tensor and dloss.item() == 1.0
    gradients = {
        name: (value if as_they_are else value * dloss.to(value.dtype))
        for name, need, value in zip(_TENSORS, ctx.needs, ctx.saved_tensors, strict=True)
        if need
    }
    return _gradients(gradients, ctx.inputs)


def _rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = Problem(*inputs)
    empty = problem.contexts.new_empty
    rows = empty((problem.tasks, problem.rows), dtype=torch.float32)
    columns = problem.rows if problem.symmetric else 0
    row_lse, column_lse = (rows.new_empty(2, problem.tasks, length) for length in (problem.rows, columns))
    return rows, torch.empty_like(rows), row_lse, column_lse


def _gradients_fake(problem: Problem, needs: tuple[bool, ...]) -> list[Tensor]:
    return [
        torch.empty_like(value, memory_format=torch.contiguous_format)
        if need and value is not None
        else problem.contexts.new_empty(0, dtype=torch.float32 if name == "scale" else problem.contexts.dtype)
        for name, value, need in zip(_TENSORS, _tensors(problem), needs, strict=True)
    ]


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_gradients_fake(Problem(*inputs[:_FIELDS]), inputs[-len(_TENSORS) :]))


def _mean_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = Problem(*inputs[:_FIELDS])
    task_loss = problem.contexts.new_empty(problem.tasks, dtype=torch.float32)
    gradients = _gradients_fake(problem, inputs[-len(_TENSORS) :])
    return task_loss.new_empty(()), task_loss, torch.empty_like(task_loss), *gradients


if _library.has_cpp_ops():
    torch.library.register_fake("avppc::info_nce_cpu", _rows_fake)
    torch.library.register_fake("avppc::info_nce_cpu_backward", _backward_fake)
    torch.library.register_fake("avppc::info_nce_cpu_mean", _mean_fake)
    torch.library.register_autograd("avppc::info_nce_cpu", _rows_backward, setup_context=_rows_setup_context)
    torch.library.register_autograd("avppc::info_nce_cpu_mean", _mean_backward, setup_context=_mean_setup_context)
