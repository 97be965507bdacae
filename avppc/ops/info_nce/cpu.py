"""bilinear_info_nce by the compiled operators for CPU tensors: their calls, derivatives and shapes.

The mean over sub-tasks and rows is one operator, which computes the gradients along with the loss while each block of
logits is at hand. For any other reduction the gradient of each row's loss is known only in the backward, which computes
the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.constant_tensors import is_plain
from avppc.ops.info_nce.autograd import (
    FIELDS,
    MOMENT_FIELDS,
    NEEDS,
    backward_fake,
    gradients_fake,
    gradients_of,
    gradients_of_rows,
    refuse_double_backward,
    rows_backward,
    rows_fake,
    save_rows,
)
from avppc.ops.info_nce.problem import MomentProblem, Problem

MISSING = _library.missing_reason("cpp")
"""Why these operators cannot be used here, with what to do about it; None when they can."""
_MEANS = {"bilinear_info_nce": "info_nce_cpu_mean", "moment_info_nce": "info_nce_moments_cpu_mean"}
"""The operator of the mean, by the function that calls it."""


def info_nce_cpu_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Losses [K, N], differentiable, and whether each positive beats every negative [K, N]."""
    rows, correct = _Rows.apply(*problem.distinct())  # type: ignore[no-untyped-call]  # torch does not annotate it
    return rows, correct


def info_nce_cpu_mean(problem: Problem, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum(shares * task losses), differentiable; task losses [K]; accuracies [K]. The shares are [K] float32."""
    return _mean("bilinear_info_nce", problem, shares)


def info_nce_moments_cpu_mean(problem: MomentProblem, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As info_nce_cpu_mean."""
    return _mean("moment_info_nce", problem, shares)


def _mean(function: str, problem: Problem | MomentProblem, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (problem.contexts, problem.targets, problem.weights, problem.scale)
    needs = [torch.is_grad_enabled() and value is not None and value.requires_grad for value in tensors]
    if not any(needs):
        loss, task_loss, accuracy, *_ = getattr(torch.ops.avppc, _MEANS[function])(*problem, shares, *needs)
        return loss, task_loss, accuracy
    loss, task_loss, accuracy = _Mean.apply(  # type: ignore[no-untyped-call]  # as above
        function, *problem.distinct(), shares, *needs
    )
    return loss, task_loss, accuracy


def _is_last_backward(upstream: Tensor) -> bool:
    """Whether the graph is freed after this backward, so that what it has saved may be changed and given away."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(upstream) or functorch.is_legacy_batchedtensor(upstream):
        return False  # several backwards in one
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class _Rows(torch.autograd.Function):
    """Losses of rows. The backward computes the logits again, since each row's gradient is known only then."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        rows, correct, *statistics = torch.ops.avppc.info_nce_cpu(*inputs)
        save_rows(ctx, Problem(*inputs), correct, statistics)
        return rows, correct

    @staticmethod
    def backward(ctx: Any, drows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cpp")
        return rows_backward(ctx, torch.ops.avppc.info_nce_cpu_backward, drows)


class _Mean(torch.autograd.Function):
    """The weighted mean of the losses; the gradients are computed along with it.

    The inputs are the operator's after the function's name: a problem's fields, the shares, which gradients are needed.
    """

    @staticmethod
    def forward(ctx: Any, function: str, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, task_loss, accuracy, *gradients = getattr(torch.ops.avppc, _MEANS[function])(*inputs)
        ctx.mark_non_differentiable(task_loss, accuracy)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # no zeros for task_loss and accuracy
        ctx.function, ctx.dtype, ctx.inputs = function, inputs[0].dtype, len(inputs)
        ctx.save_for_backward(
            *[value if need else None for need, value in zip(inputs[-NEEDS:], gradients, strict=True)]
        )
        return loss, task_loss, accuracy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cpp", ctx.function)
        if dloss is None:  # nothing after the loss has a gradient: with set_materialize_grads there is no zero for it
            return (None,) * (1 + ctx.inputs)
        return None, *gradients_of(_scaled(ctx.saved_tensors, dloss, ctx.dtype), ctx.inputs)


def _scaled(gradients: tuple[Tensor | None, ...], upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The gradients of (contexts, targets, weights, scale), times the upstream one; the first three get dtype."""
    if not _is_last_backward(upstream):  # copies even for a factor of 1: the next backward needs the saved gradients
        gradients = tuple(value if value is None else value * upstream for value in gradients)
    elif not is_plain(upstream) or upstream.item() != 1.0:
        gradients = tuple(value if value is None else value.mul_(upstream) for value in gradients)
    if dtype == torch.float16:  # its gradients are float32 until the upstream factor is in
        *embeddings, scale = gradients
        gradients = *[value if value is None else value.to(dtype) for value in embeddings], scale
    return gradients


def _mean_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = Problem(*inputs[:FIELDS])
    task_loss = problem.contexts.new_empty(problem.tasks, dtype=torch.float32)
    wide = problem._replace(contexts=problem.contexts.float()) if problem.contexts.dtype == torch.float16 else problem
    gradients = gradients_fake(wide, inputs[-NEEDS:])
    return task_loss.new_empty(()), task_loss, torch.empty_like(task_loss), *gradients


def info_nce_moments_cpu_rows(problem: MomentProblem) -> tuple[Tensor, Tensor]:
    """As info_nce_cpu_rows, of all moments: [K, N Tc]."""
    rows, correct = _MomentRows.apply(*problem.distinct())  # type: ignore[no-untyped-call]  # as above
    return rows, correct


class _MomentRows(torch.autograd.Function):
    """Losses of moments; as _Rows."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        rows, correct, row_lse = torch.ops.avppc.info_nce_moments_cpu(*inputs)
        ctx.mark_non_differentiable(correct)
        ctx.numbers = [value for value in inputs if isinstance(value, int)]
        ctx.save_for_backward(*(value for value in inputs if not isinstance(value, int)), row_lse)
        return rows, correct

    @staticmethod
    def backward(ctx: Any, drows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cpp", "moment_info_nce")
        *embeddings, context_ids, target_ids, candidates, shifts, row_lse = ctx.saved_tensors
        offset, rows, columns = ctx.numbers
        inputs = (*embeddings, offset, context_ids, target_ids, rows, columns, candidates, shifts, row_lse)
        return gradients_of_rows(ctx, torch.ops.avppc.info_nce_moments_cpu_backward, inputs, drows, MOMENT_FIELDS)


def _moment_rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = MomentProblem(*inputs)
    rows = problem.contexts.new_empty((len(problem.pairs), problem.contexts.shape[1]), dtype=torch.float32)
    return rows, torch.empty_like(rows), rows.new_empty(2, *rows.shape)


def _moment_backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(gradients_fake(MomentProblem(*inputs[:MOMENT_FIELDS]), inputs[-NEEDS:]))


def _moment_mean_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = MomentProblem(*inputs[:MOMENT_FIELDS])
    task_loss = problem.contexts.new_empty(len(problem.pairs), dtype=torch.float32)
    wide = problem._replace(contexts=problem.contexts.float()) if problem.contexts.dtype == torch.float16 else problem
    return task_loss.new_empty(()), task_loss, torch.empty_like(task_loss), *gradients_fake(wide, inputs[-NEEDS:])


if MISSING is None:
    torch.library.register_fake("avppc::info_nce_cpu", rows_fake)
    torch.library.register_fake("avppc::info_nce_cpu_backward", backward_fake)
    torch.library.register_fake("avppc::info_nce_cpu_mean", _mean_fake)
    torch.library.register_fake("avppc::info_nce_moments_cpu", _moment_rows_fake)
    torch.library.register_fake("avppc::info_nce_moments_cpu_backward", _moment_backward_fake)
    torch.library.register_fake("avppc::info_nce_moments_cpu_mean", _moment_mean_fake)
