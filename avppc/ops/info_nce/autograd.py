"""What the autograd functions of the compiled backends share. Their inputs are the fields of a Problem, then others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from avppc.ops.derivatives import refuse_second_derivative
from avppc.ops.info_nce.problem import MomentProblem, Problem

FIELDS = len(Problem._fields)
MOMENT_FIELDS = len(MomentProblem._fields)
_DIFFERENTIABLE = [Problem._fields.index(name) for name in ("contexts", "targets", "weights", "scale")]
NEEDS = 4
"""Flags at the end of an operator's inputs: gradients of contexts, targets, weights, scale."""


def refuse_double_backward(backend: str, function: str = "bilinear_info_nce") -> None:
    """Raises RuntimeError in a backward that is itself to be differentiated."""
    refuse_second_derivative(f"{function}(backend={backend!r})", "use backend='reference' with create_graph=True")


def gradients_of(found: tuple[Tensor | None, ...], inputs: int) -> tuple[Tensor | None, ...]:
    """Gradients of (contexts, targets, weights, scale), as those of all inputs: a Problem's fields, then the others."""
    contexts, targets, weights, scale = found
    return (contexts, targets, weights, None, scale) + (None,) * (inputs - 5)


def save_rows(ctx: Any, problem: Problem, correct: Tensor, statistics: Sequence[Tensor]) -> None:
    """Keeps what `rows_backward` needs of a forward that gave losses of rows and `correct`."""
    ctx.mark_non_differentiable(correct)
    ctx.settings = problem.positive_offset, problem.symmetric
    tensors = (problem.contexts, problem.targets, problem.weights, problem.pairs, problem.scale)
    ctx.save_for_backward(*tensors, problem.context_ids, problem.target_ids, *statistics)


def rows_backward(ctx: Any, operator: Callable[..., Sequence[Tensor]], drows: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a Problem's fields, by a backward operator that computes the logits again."""
    contexts, targets, weights, pairs, scale, context_ids, target_ids, *statistics = ctx.saved_tensors
    offset, symmetric = ctx.settings
    problem = Problem(contexts, targets, weights, pairs, scale, offset, context_ids, target_ids, symmetric)
    return gradients_of_rows(ctx, operator, (*problem, *statistics), drows, FIELDS)


def gradients_of_rows(
    ctx: Any, operator: Callable[..., Sequence[Tensor]], inputs: tuple[Any, ...], drows: Tensor, fields: int
) -> tuple[Tensor | None, ...]:
    """The gradients of a problem's `fields` by a backward operator, where they are needed."""
    needs = [ctx.needs_input_grad[field] for field in _DIFFERENTIABLE]
    found = operator(*inputs, drows, *needs)
    wanted = tuple(value if need else None for need, value in zip(needs, found, strict=True))
    return gradients_of(wanted, fields)


def rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    """Fake losses [K, N], hits [K, N] and log-sum-exps of rows and columns: their shapes and dtypes."""
    problem = Problem(*inputs)
    K, N, M = problem.tasks, problem.rows, problem.targets.shape[1]
    rows = problem.contexts.new_empty((K, N), dtype=torch.float32)
    row_lse, column_lse = (rows.new_empty(2, K, length) for length in (N, M if problem.symmetric else 0))
    return rows, torch.empty_like(rows), row_lse, column_lse


def gradients_fake(problem: Problem | MomentProblem, needs: tuple[bool, ...]) -> list[Tensor]:
    """Fake gradients of contexts, targets, weights and scale: their shapes and dtypes; empty where not needed."""
    values = (problem.contexts, problem.targets, problem.weights, problem.scale)
    dtypes = (*[problem.contexts.dtype] * 3, torch.float32)
    return [
        problem.contexts.new_empty(value.shape if need and value is not None else (0,), dtype=dtype)
        for value, need, dtype in zip(values, needs, dtypes, strict=True)
    ]


def backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    """Fake results of a backward operator: their shapes and dtypes."""
    return tuple(gradients_fake(Problem(*inputs[:FIELDS]), inputs[-NEEDS:]))
