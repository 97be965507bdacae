"""What the autograd functions of the compiled backends share. Their inputs are the fields of a Problem, then others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avppc.ops.info_nce.problem import NO_POSITIVE, MomentProblem, Problem, without_aliases
from avppc.ops.modes import refuse_second_derivative

_DIFFERENTIABLE = [Problem._fields.index(name) for name in ("contexts", "targets", "weights", "scale")]
_OFFSET = Problem._fields.index("positive_offset")
NEEDS = 4
"""Flags at the end of an operator's inputs: gradients of contexts, targets, weights, scale."""


def refuse_double_backward(backend: str, function: str = "bilinear_info_nce") -> None:
    """Raises RuntimeError in a backward that is itself to be differentiated."""
    refuse_second_derivative(f"{function}(backend={backend!r})", "use backend='reference' with create_graph=True")


def gradients_of(found: tuple[Tensor | None, ...], inputs: int) -> tuple[Tensor | None, ...]:
    """Gradients of (contexts, targets, weights, scale), as those of all inputs: a Problem's fields, then the others."""
    contexts, targets, weights, scale = found
    return (contexts, targets, weights, None, scale) + (None,) * (inputs - 5)


def solve_rows(function: str, backend: str, operator: str, problem: Problem | MomentProblem) -> tuple[Tensor, Tensor]:
    """Losses of rows, differentiable, and whether each positive beats every negative, by a compiled operator.

    Where positive_offset is NO_POSITIVE the losses are log-sum-exps, and the others mean nothing.

    Args:
        function, backend: their names, for the text of an error.
        operator: its name; OPERATOR_backward takes the same inputs, what the forward returns beside the losses and
            hits, the upstream gradient, and the NEEDS.
    """
    rows, correct = _Rows.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        function, backend, operator, *without_aliases(problem)
    )
    return rows, correct


class _Rows(torch.autograd.Function):
    """Losses of rows. The backward computes the logits again, since each row's gradient is known only then."""

    @staticmethod
    def forward(ctx: Any, function: str, backend: str, operator: str, *inputs: Any) -> tuple[Tensor, Tensor]:
        rows, correct, *statistics = getattr(torch.ops.avppc, operator)(*inputs)
        ctx.mark_non_differentiable(correct)
        ctx.function, ctx.backend, ctx.operator = function, backend, operator
        ctx.settings = [None if value is None or isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in inputs], *statistics)
        return rows, correct

    @staticmethod
    def backward(ctx: Any, drows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.backend, ctx.function)
        fields = len(ctx.settings)
        tensors, statistics = ctx.saved_tensors[:fields], ctx.saved_tensors[fields:]
        inputs = [value if plain is None else plain for value, plain in zip(tensors, ctx.settings, strict=True)]
        if inputs[_OFFSET] == NO_POSITIVE:  # a row without any candidate has no gradient: its softmax is not 0 / 0
            lse, *others = statistics
            statistics = (lse.masked_fill(lse[1] == -torch.inf, 0.0), *others)
        needs = [ctx.needs_input_grad[3 + field] for field in _DIFFERENTIABLE]
        found = getattr(torch.ops.avppc, f"{ctx.operator}_backward")(*inputs, *statistics, drows, *needs)
        wanted = tuple(value if need else None for need, value in zip(needs, found, strict=True))
        return None, None, None, *gradients_of(wanted, fields)


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
    return tuple(gradients_fake(Problem(*inputs[: len(Problem._fields)]), inputs[-NEEDS:]))


def moment_rows_fake(*inputs: Any) -> tuple[Tensor, ...]:
    """Fake losses [K, N Tc], hits [K, N Tc] and log-sum-exps [2, K, N Tc]: their shapes and dtypes."""
    problem = MomentProblem(*inputs)
    rows = problem.contexts.new_empty((len(problem.pairs), problem.contexts.shape[1]), dtype=torch.float32)
    return rows, torch.empty_like(rows), rows.new_empty(2, *rows.shape)


def moment_backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    """Fake results of a backward operator of moments: their shapes and dtypes."""
    return tuple(gradients_fake(MomentProblem(*inputs[: len(MomentProblem._fields)]), inputs[-NEEDS:]))
