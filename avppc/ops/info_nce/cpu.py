"""bilinear_info_nce and moment_info_nce by the compiled operators for CPU tensors: their calls, derivatives and shapes.

The mean over sub-tasks and rows is one operator, which computes the gradients along with the loss while each block of
logits is at hand. For any other reduction the gradient of each row's loss is known only in the backward, which computes
the logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from avppc.ops import _library
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
from avppc.ops.info_nce.problem import MomentProblem, Pairs, Problem, constant_pairs, scale_tensor, without_aliases
from avppc.ops.modes import is_plain, is_plain_cpu_call

MISSING = _library.missing_reason("cpp")
"""Why these operators cannot be used here, with what to do about it; None when they can."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES: dict[type, tuple[str, str]] = {
    Problem: ("bilinear_info_nce", "info_nce_cpu"),
    MomentProblem: ("moment_info_nce", "info_nce_moments_cpu"),
}
"""By the kind of problem: the public function, and the operator; the operator of the mean is OPERATOR_mean."""


def info_nce_cpu_rows(problem: Problem | MomentProblem) -> tuple[Tensor, Tensor]:
    """Losses [K, N], differentiable, and whether each positive beats every negative [K, N]; of moments [K, N Tc]."""
    function, operator = _NAMES[type(problem)]
    return solve_rows(function, "cpp", operator, problem)


def info_nce_cpu_mean(problem: Problem | MomentProblem, shares: Tensor) -> tuple[Tensor, Tensor]:
    """sum(shares * task losses), differentiable; losses and accuracies of the sub-tasks [2, K]. The shares are [K]."""
    function, operator = _NAMES[type(problem)]
    return _mean(function, f"{operator}_mean", *without_aliases(problem), shares)


def info_nce_cpu_at_once(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    pairs: Pairs | None,
    scale: float | Tensor,
    positive_offset: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor] | None:
    """info_nce_cpu_mean of arguments that nobody has checked, or None: then look at them one by one.

    Those checks, which say what is wrong, would take longer than a small loss. The operator makes them all as well, but
    for the types of numbers, and says less. So a plain call goes straight to it. None comes back where the call is no
    plain one, or the operator refuses it.
    """
    tensors: list[object] = [contexts, targets]
    if weights is not None:
        tensors.append(weights)
    if not isinstance(scale, (int, float)):
        tensors.append(scale)
    if pairs is not None and not isinstance(pairs, (list, tuple)):
        tensors.append(pairs)
    if MISSING is not None or not is_plain_cpu_call(*tensors) or contexts.dtype not in _DTYPES:
        return None
    if type(positive_offset) is not int or type(symmetric) is not bool or isinstance(scale, bool):
        return None
    if isinstance(scale, (int, float)):
        scale = scale_tensor(scale, contexts)
    if isinstance(pairs, (list, tuple)):
        pairs = constant_pairs(pairs, contexts)
    settings = (positive_offset, None, None, symmetric, None)  # no ids; equal shares
    try:
        return _mean("bilinear_info_nce", "info_nce_cpu_mean", contexts, targets, weights, pairs, scale, *settings)
    except RuntimeError:  # the operator refuses it
        return None


def _mean(function: str, operator: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The operator's loss, differentiable, and statistics; the inputs are its own up to the NEEDS."""
    contexts, targets, weights, _, scale = inputs[:5]
    needs = (False,) * NEEDS
    if torch.is_grad_enabled():
        with_weights = weights is not None and weights.requires_grad
        needs = contexts.requires_grad, targets.requires_grad, with_weights, scale.requires_grad
    if True in needs:
        loss, statistics = _Mean.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
            function, operator, *inputs, *needs
        )
    else:
        loss, statistics, _ = getattr(torch.ops.avppc, operator).default(*inputs, *needs)
    return loss, statistics


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
    def forward(ctx: Any, function: str, operator: str, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss, statistics, gradients = getattr(torch.ops.avppc, operator).default(*inputs)
        ctx.mark_non_differentiable(statistics)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # no zeros for the statistics
        ctx.function, ctx.dtype, ctx.inputs, ctx.needs = function, inputs[0].dtype, len(inputs), inputs[-NEEDS:]
        ctx.save_for_backward(*gradients)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cpp", ctx.function)
        if dloss is None:  # nothing after the loss has a gradient: with set_materialize_grads there is no zero for it
            return (None,) * (2 + ctx.inputs)
        scaled = iter(_scaled(ctx.saved_tensors, dloss))
        gradients = [next(scaled) if need else None for need in ctx.needs]
        if ctx.dtype == torch.float16:  # its gradients are float32 until the upstream factor is in
            *embeddings, scale = gradients
            gradients = [*[value if value is None else value.to(ctx.dtype) for value in embeddings], scale]
        return None, None, *gradients_of(tuple(gradients), ctx.inputs)


def _scaled(gradients: tuple[Tensor, ...], upstream: Tensor) -> Sequence[Tensor]:
    """The gradients times the upstream one."""
    if not _is_last_backward(upstream):  # copies even for a factor of 1: the next backward needs the saved gradients
        return [value * upstream for value in gradients]
    if not is_plain(upstream) or upstream.item() != 1.0:
        return [value.mul_(upstream) for value in gradients]
    return gradients


def _mean_fake(kind: type[Problem] | type[MomentProblem]) -> Callable[..., tuple[Tensor, Tensor, list[Tensor]]]:
    def fake(*inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        problem, needs = kind(*inputs[: len(kind._fields)]), inputs[-NEEDS:]
        contexts = problem.contexts.float() if problem.contexts.dtype == torch.float16 else problem.contexts
        own_pairs = contexts.shape[0] if contexts.ndim == 3 else 1
        statistics = contexts.new_empty(
            (2, own_pairs if problem.pairs is None else len(problem.pairs)), dtype=torch.float32
        )
        gradients = gradients_fake(problem._replace(contexts=contexts), needs)
        found = [value for value, need in zip(gradients, needs, strict=True) if need]
        return statistics.new_empty(()), statistics, found

    return fake


if MISSING is None:
    torch.library.register_fake("avppc::info_nce_cpu", rows_fake)
    torch.library.register_fake("avppc::info_nce_cpu_backward", backward_fake)
    torch.library.register_fake("avppc::info_nce_cpu_mean", _mean_fake(Problem))
    torch.library.register_fake("avppc::info_nce_moments_cpu", moment_rows_fake)
    torch.library.register_fake("avppc::info_nce_moments_cpu_backward", moment_backward_fake)
    torch.library.register_fake("avppc::info_nce_moments_cpu_mean", _mean_fake(MomentProblem))
