"""bilinear_info_nce and moment_info_nce by the compiled operators for CPU tensors: their calls, derivatives and shapes.

The mean over sub-tasks and rows is one operator, which computes the gradients along with the loss while each block of
logits is at hand. For any other reduction the gradient of each row's loss is known only in the backward, which computes
the logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.constant_tensors import is_plain
from avppc.ops.info_nce.autograd import (
    NEEDS,
    backward_fake,
    gradients_fake,
    gradients_of,
    moment_backward_fake,
    moment_rows_fake,
    refuse_double_backward,
    rows_fake,
    solve_rows,
)
from avppc.ops.info_nce.problem import MomentProblem, Problem, without_aliases

MISSING = _library.missing_reason("cpp")
"""Why these operators cannot be used here, with what to do about it; None when they can."""
_NAMES: dict[type, tuple[str, str]] = {
    Problem: ("bilinear_info_nce", "info_nce_cpu"),
    MomentProblem: ("moment_info_nce", "info_nce_moments_cpu"),
}
"""By the kind of problem: the public function, and the operator; the operator of the mean is OPERATOR_mean."""


def info_nce_cpu_rows(problem: Problem | MomentProblem) -> tuple[Tensor, Tensor]:
    """Losses [K, N], differentiable, and whether each positive beats every negative [K, N]; of moments [K, N Tc]."""
    function, operator = _NAMES[type(problem)]
    return solve_rows(function, "cpp", operator, problem)


def info_nce_cpu_mean(problem: Problem | MomentProblem, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum(shares * task losses), differentiable; task losses [K]; accuracies [K]. The shares are [K] float32."""
    function, operator = _NAMES[type(problem)]
    tensors = (problem.contexts, problem.targets, problem.weights, problem.scale)
    needs = [torch.is_grad_enabled() and value is not None and value.requires_grad for value in tensors]
    if not any(needs):
        loss, task_loss, accuracy, *_ = getattr(torch.ops.avppc, f"{operator}_mean")(*problem, shares, *needs)
        return loss, task_loss, accuracy
    loss, task_loss, accuracy = _Mean.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        function, operator, *without_aliases(problem), shares, *needs
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


class _Mean(torch.autograd.Function):
    """The weighted mean of the losses; the gradients are computed along with it.

    The inputs are the operator's after two names: a problem's fields, the shares, which gradients are needed.
    """

    @staticmethod
    def forward(ctx: Any, function: str, operator: str, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, task_loss, accuracy, *gradients = getattr(torch.ops.avppc, f"{operator}_mean")(*inputs)
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
            return (None,) * (2 + ctx.inputs)
        return None, None, *gradients_of(_scaled(ctx.saved_tensors, dloss, ctx.dtype), ctx.inputs)


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


def _mean_fake(kind: type[Problem] | type[MomentProblem]) -> Callable[..., tuple[Tensor, ...]]:
    def fake(*inputs: Any) -> tuple[Tensor, ...]:
        problem = kind(*inputs[: len(kind._fields)])
        contexts = problem.contexts.float() if problem.contexts.dtype == torch.float16 else problem.contexts
        task_loss = contexts.new_empty(len(problem.pairs), dtype=torch.float32)
        gradients = gradients_fake(problem._replace(contexts=contexts), inputs[-NEEDS:])
        return task_loss.new_empty(()), task_loss, torch.empty_like(task_loss), *gradients

    return fake


if MISSING is None:
    torch.library.register_fake("avppc::info_nce_cpu", rows_fake)
    torch.library.register_fake("avppc::info_nce_cpu_backward", backward_fake)
    torch.library.register_fake("avppc::info_nce_cpu_mean", _mean_fake(Problem))
    torch.library.register_fake("avppc::info_nce_moments_cpu", moment_rows_fake)
    torch.library.register_fake("avppc::info_nce_moments_cpu_backward", moment_backward_fake)
    torch.library.register_fake("avppc::info_nce_moments_cpu_mean", _mean_fake(MomentProblem))
