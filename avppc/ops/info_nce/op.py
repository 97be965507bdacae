"""Bilinear InfoNCE over many sub-tasks that share embeddings: the public op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from avppc.checks import check_bool, check_choice, without_autocast
from avppc.ops import _library
from avppc.ops.info_nce import cpu
from avppc.ops.info_nce.agreement import GATHERS, has_others
from avppc.ops.info_nce.problem import MomentProblem, Pairs, Problem, check_positives, make_problem
from avppc.ops.info_nce.reference import (
    BilinearScores,
    best_targets,
    info_nce_accuracy_reference,
    info_nce_logits_reference,
    info_nce_positive_rows_reference,
    info_nce_rows_reference,
    left_out_positive_scores,
    map_logits,
    mean_positive_scores,
    positive_hits,
)
from avppc.ops.info_nce.triton.op import info_nce_triton_rows
from avppc.ops.modes import constant, plain_torch_alone

REDUCTIONS = ("mean", "task", "none")
BACKENDS = ("auto", "triton", "cpp", "reference")


class InfoNCEStats(NamedTuple):
    """Metrics of each sub-task in one call; without gradient."""

    task_loss: Tensor
    """[K] mean loss of each sub-task, in nats; log(M) - task_loss bounds its mutual information from below."""
    accuracy: Tensor
    """[K] share of contexts whose positive scores above each of their negatives, 0 to 1; a tie is a miss."""


@overload
def bilinear_info_nce(
    contexts: Tensor, targets: Tensor, weights: Tensor | None = None, pairs: Pairs | None = None, *,
    scale: float | Tensor = 1.0, positive_offset: int = 0, context_ids: Tensor | None = None,
    target_ids: Tensor | None = None, positives: Tensor | None = None, symmetric: bool = False,
    reduction: str = "mean", backend: str = "auto", gather: str = "none", return_stats: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def bilinear_info_nce(
    contexts: Tensor, targets: Tensor, weights: Tensor | None = None, pairs: Pairs | None = None, *,
    scale: float | Tensor = 1.0, positive_offset: int = 0, context_ids: Tensor | None = None,
    target_ids: Tensor | None = None, positives: Tensor | None = None, symmetric: bool = False,
    reduction: str = "mean", backend: str = "auto", gather: str = "none", return_stats: Literal[True],
) -> tuple[Tensor, InfoNCEStats]: ...  # fmt: skip
@overload
def bilinear_info_nce(
    contexts: Tensor, targets: Tensor, weights: Tensor | None = None, pairs: Pairs | None = None, *,
    scale: float | Tensor = 1.0, positive_offset: int = 0, context_ids: Tensor | None = None,
    target_ids: Tensor | None = None, positives: Tensor | None = None, symmetric: bool = False,
    reduction: str = "mean", backend: str = "auto", gather: str = "none", return_stats: bool,
) -> Tensor | tuple[Tensor, InfoNCEStats]: ...  # fmt: skip
def bilinear_info_nce(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    pairs: Pairs | None = None,
    *,
    scale: float | Tensor = 1.0,
    positive_offset: int = 0,
    context_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    positives: Tensor | None = None,
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    gather: str = "none",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """K InfoNCE losses with bilinear scores: each context must find its target among the targets of the whole batch.

    In plain torch, for the sub-task k with (c, z) = (contexts[pairs[k, 0]], targets[pairs[k, 1]]):

        s = scale * c @ weights[k].T @ z.T                                 # [N, M]
        loss[k] = F.cross_entropy(s, torch.arange(N) + positive_offset, reduction="none")

    With positives, which may be several a row (supervised contrastive: L_out of Khosla et al., NeurIPS 2020):

        loss[k, i] = torch.stack([s[i].logsumexp(0) - s[i, p] for p in positives[i] if p >= 0]).mean()

    Args:
        contexts: [C, N, Dc], or [N, Dc] for a single one; float32, bfloat16, float16, or float64 (reference alone).
        targets: [U, M, Dz], or [M, Dz], with M >= N, but for positives; dtype and device as the contexts.
        weights: [K, Dz, Dc], or [Dz, Dc]; None scores by plain dot products (Dc == Dz), as CLIP does.
        pairs: [K, 2], the (context index, target index) of each sub-task, best given on the CPU; None: sub-task k uses
            context k and target k.
        scale: multiplies the logits; a 0-d tensor receives a gradient.
        positive_offset: the positive of context row i is target row i + positive_offset; 0 to M - N.
        context_ids: [N] integers, given together with target_ids.
        target_ids: [M] integers: targets with a context's id, other than its positive, are left out of its negatives.
        positives: [N] or [N, P] integers, the numbers of each context's positive targets, the same for all sub-tasks;
            -1: none, but at least one a row. All of them stay among the candidates. A target's own row is one of its
            negatives unless it is left out by ids. Not beside positive_offset or symmetric. A positive's score is
            computed apart, so a loss near 0 is right to the rounding of the logits alone. Positives that have their
            context's id take N P Dz numbers.
        symmetric: averages the loss of rows (contexts look for targets) and of columns (the reverse); needs M == N.
        reduction: "mean" for a 0-d loss; "task" for [K], the mean over rows; "none" for [K, N].
        backend: "triton" (CUDA, compute capability 8.0 or more), "cpp" (CPU), "reference" (plain torch), or "auto":
            the fastest that can run.
        gather: "none", "all" or "ring", as in BilinearInfoNCE: with torch.distributed the targets of all processes are
            the negatives. Weights and scale with gradients must be inside what averages the gradients.
        return_stats: also return InfoNCEStats, which costs next to nothing; with positives the logits are computed once
            more, some at a time, and a hit is a row whose best positive scores above each negative.

    Returns:
        The loss, a Tensor of float32 (float64 for float64); with return_stats, (loss, InfoNCEStats). Under autocast
        the products run in autocast's dtype. Under forward-mode derivatives, torch.func (also inside torch.compile),
        torch.export, make_fx and torch.jit.trace, "auto" is "reference".

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the text names it.
        RuntimeError: the backend asked for is not available here.
    """
    check_bool("return_stats", return_stats)
    if not (isinstance(gather, str) and gather == "none"):
        check_choice("gather", gather, GATHERS)
        if positives is not None:
            raise ValueError(
                "positives go with gather='none' alone here; BilinearInfoNCE(weight=False) gathers with them"
            )
        if has_others():
            from avppc.ops.info_nce.distributed import solve_call_gathered  # which imports this module

            ids = {"context_ids": context_ids, "target_ids": target_ids}
            options = {**ids, "scale": scale, "positive_offset": positive_offset, "symmetric": symmetric}
            found = solve_call_gathered(contexts, targets, weights, pairs, options, gather, reduction, backend)
            return found if return_stats else found[0]
    if context_ids is None and target_ids is None and positives is None:
        arguments = contexts, targets, weights, pairs, scale, positive_offset, symmetric
        at_once = solve_at_once(*arguments, reduction, backend, return_stats)
        if at_once is not None:
            return at_once
    problem = make_problem(
        contexts,
        targets,
        weights,
        pairs,
        scale=scale,
        positive_offset=positive_offset,
        context_ids=context_ids,
        target_ids=target_ids,
        symmetric=symmetric,
        with_offset=positives is None,
    )
    if positives is None:
        loss, stats = solve(problem, reduction, None, backend, return_stats)
    else:
        positives = check_positives(positives, problem.contexts, problem.targets.shape[1])
        loss, stats = solve_positives(problem, positives, reduction, None, backend, return_stats)
    return loss if stats is None else (loss, stats)


def bilinear_scores(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    pairs: Pairs | None = None,
    *,
    scale: float | Tensor = 1.0,
    context_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    backend: str = "auto",
) -> BilinearScores:
    """The log-sum-exp of each context's scores and its best target, without the scores themselves.

    In plain torch, with the s of bilinear_info_nce for each sub-task:

        s = s.masked_fill(context_ids[:, None] == target_ids, -torch.inf)    # if there are ids
        log_sum_exp[k], argmax[k] = s.logsumexp(1), s.argmax(1)

    Targets with a context's id are left out, all of them: with ids that count the rows the log-sum-exp is that of the
    other rows alone. The best target is found in a second pass, which holds some 4 million scores at a time.

    Args:
        contexts: [C, N, Dc], or [N, Dc] for a single one.
        targets: [U, M, Dz], or [M, Dz]; M may be less than N.
        weights, pairs, scale, backend: as in bilinear_info_nce.
        context_ids: [N] integers, given together with target_ids.
        target_ids: [M] integers.

    Raises:
        ValueError, TypeError, RuntimeError: as bilinear_info_nce.
    """
    problem = make_problem(
        contexts,
        targets,
        weights,
        pairs,
        scale=scale,
        context_ids=context_ids,
        target_ids=target_ids,
        with_offset=False,
    )
    log_sum_exp = _log_sum_exp(problem, pick_backend(problem, backend))
    return BilinearScores(log_sum_exp, map_logits(problem, lambda s, _: best_targets(s)))


def solve_at_once(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    pairs: Pairs | None,
    scale: float | Tensor,
    positive_offset: int,
    symmetric: bool,
    reduction: str,
    backend: str,
    with_stats: bool,
) -> Tensor | tuple[Tensor, InfoNCEStats] | None:
    """What bilinear_info_nce returns, without a look at each argument where the C++ operator can do that; else None."""
    if not (isinstance(reduction, str) and reduction == "mean"):
        return None
    if not (isinstance(backend, str) and backend in ("auto", "cpp")):
        return None
    found = cpu.info_nce_cpu_at_once(contexts, targets, weights, pairs, scale, positive_offset, symmetric)
    if found is None or not with_stats:
        return found and found[0]
    loss, statistics = found
    return loss, InfoNCEStats(*statistics.unbind())


@overload
def solve(
    problem: Problem,
    reduction: str,
    task_weights: Sequence[float] | None,
    backend: str,
    with_stats: Literal[True] = True,
) -> tuple[Tensor, InfoNCEStats]: ...
@overload
def solve(
    problem: Problem, reduction: str, task_weights: Sequence[float] | None, backend: str, with_stats: bool
) -> tuple[Tensor, InfoNCEStats | None]: ...
def solve(
    problem: Problem, reduction: str, task_weights: Sequence[float] | None, backend: str, with_stats: bool = True
) -> tuple[Tensor, InfoNCEStats | None]:
    """The loss of a checked problem; task_weights (K numbers) weigh the sub-tasks in the reduction "mean"."""
    check_choice("reduction", reduction, REDUCTIONS)
    picked = pick_backend(problem, backend)
    if picked == "reference":
        return _solve_reference(problem, reduction, task_weights, with_stats)
    loss, stats = _SOLVERS[picked](problem, reduction, task_weights)
    return loss, stats if with_stats else None


def solve_positives(
    problem: Problem,
    positives: Tensor,
    reduction: str,
    task_weights: Sequence[float] | None,
    backend: str,
    with_stats: bool = True,
) -> tuple[Tensor, InfoNCEStats | None]:
    """As `solve`, of a problem without an offset, and the positives [N, P] of its rows, checked."""
    check_choice("reduction", reduction, REDUCTIONS)
    picked, ids = pick_backend(problem, backend), (problem.context_ids, problem.target_ids)
    nothing_left_out = problem._replace(context_ids=None, target_ids=None)
    with without_autocast(problem.contexts):
        if picked == "reference":
            s = info_nce_logits_reference(*nothing_left_out[:-1])
            rows = info_nce_positive_rows_reference(s, positives, *ids)
        else:
            total = _log_sum_exp(problem, picked)
            left_out = left_out_positive_scores(problem, positives)
            if left_out is not None:
                total = torch.cat([total[:, :, None], left_out], 2).logsumexp(2)
            rows = total - mean_positive_scores(problem, positives)
    loss = reduce_rows(rows, reduction, task_weights)
    if not with_stats:
        return loss, None

    def hits(s: Tensor, block: slice) -> Tensor:
        return positive_hits(s, positives[block], None if ids[0] is None else ids[0][block], ids[1])

    return loss, InfoNCEStats(rows.detach().mean(1), map_logits(nothing_left_out, hits).mean(1))


def _log_sum_exp(problem: Problem, picked: str) -> Tensor:
    """[K, N], differentiable, over all targets that have not their context's id."""
    if picked != "reference":
        rows = cpu.info_nce_cpu_rows if picked == "cpp" else info_nce_triton_rows
        return rows(problem)[0]
    with without_autocast(problem.contexts):
        return info_nce_logits_reference(*problem[:-1]).logsumexp(2)


def pick_backend(problem: Problem | MomentProblem, backend: str) -> str:
    """ "triton", "cpp" or "reference" for this problem."""
    function = "bilinear_info_nce" if isinstance(problem, Problem) else "moment_info_nce"
    check_choice("backend", backend, BACKENDS)
    device, dtype = problem.contexts.device, problem.contexts.dtype
    lacking = plain_torch_alone(problem.contexts, problem.targets, problem.weights, problem.scale)
    if backend == "auto":
        return _pick_automatically(function, device, dtype, lacking)
    if backend not in _library.COMPILED_PARTS:  # plain torch, which runs everywhere
        return backend
    if dtype == torch.float64:
        raise TypeError(f"contexts must be float32, bfloat16 or float16 with backend={backend!r}, got float64")
    if lacking:
        raise RuntimeError(f"{function}(backend={backend!r}) has no {lacking}; use 'reference'")
    _library.require(backend, function)
    if backend == "triton":
        reason = _library.triton_missing_reason(device.type, device.index)
        if reason is not None:
            raise ValueError(f"contexts on {device} cannot be scored with backend='triton': {reason}")
    elif device.type != "cpu":
        raise ValueError(f"contexts must be on the CPU with backend={backend!r}, got {device}")
    return backend


def _pick_automatically(function: str, device: torch.device, dtype: torch.dtype, lacking: str | None) -> str:
    """The compiled kernels of the device where they are there, else "reference", with the reason in the log."""
    if device.type not in ("cpu", "cuda"):
        return "reference"
    backend = "cpp" if device.type == "cpu" else "triton"
    reason: str | None
    if dtype == torch.float64:
        reason = "there are no kernels for float64"
    elif lacking:
        reason = f"they have no {lacking}"
    elif backend == "cpp":
        reason = cpu.MISSING
    else:
        reason = _library.triton_missing_reason("cuda", device.index)
    if reason is None:
        return backend
    _library.log_plain_torch(function, device.type, backend, reason)
    return "reference"


def _solve_reference(
    problem: Problem, reduction: str, task_weights: Sequence[float] | None, with_stats: bool
) -> tuple[Tensor, InfoNCEStats | None]:
    with without_autocast(problem.contexts):
        s = info_nce_logits_reference(*problem[:-1])
        rows = info_nce_rows_reference(s, problem.positive_offset, problem.symmetric)
        loss = reduce_rows(rows, reduction, task_weights)
        if not with_stats:
            return loss, None
        accuracy = info_nce_accuracy_reference(s.detach(), problem.positive_offset)
        return loss, InfoNCEStats(rows.detach().mean(1), accuracy)


def _solve_cpp(problem: Problem, reduction: str, task_weights: Sequence[float] | None) -> tuple[Tensor, InfoNCEStats]:
    if reduction == "mean":
        shares = shares_of(task_weights, problem.tasks, problem.scale)
        loss, statistics = cpu.info_nce_cpu_mean(problem, shares)
        return loss, InfoNCEStats(*statistics.unbind())
    rows, correct = cpu.info_nce_cpu_rows(problem)
    return reduce_rows(rows, reduction, None), InfoNCEStats(rows.detach().mean(1), correct.mean(1))


def _solve_triton(
    problem: Problem, reduction: str, task_weights: Sequence[float] | None
) -> tuple[Tensor, InfoNCEStats]:
    rows, correct = info_nce_triton_rows(problem)
    return reduce_rows(rows, reduction, task_weights), InfoNCEStats(rows.detach().mean(1), correct.mean(1))


_SOLVERS = {"cpp": _solve_cpp, "triton": _solve_triton}
"""The backends but for the reference, which computes statistics only where they are asked for."""


def reduce_rows(rows: Tensor, reduction: str, task_weights: Sequence[float] | None) -> Tensor:
    """[K, N] losses reduced: "none", "task" (mean over rows) or "mean" (over sub-tasks too, weighted)."""
    if reduction == "none":
        return rows
    tasks = rows.mean(1)
    if reduction == "task":
        return tasks
    return (shares_of(task_weights, rows.shape[0], rows) * tasks).sum()


def shares_of(task_weights: Sequence[float] | None, tasks: int, like: Tensor) -> Tensor:
    """[K], of the dtype and device of `like`: the share of each sub-task's loss in the mean; they sum to 1."""
    if task_weights is None:
        return constant(
            "equal shares", (tasks, like.dtype, like.device), lambda: like.new_full((tasks,), 1 / tasks), like
        )
    key = tuple(task_weights), like.dtype, like.device
    return constant("shares", key, lambda: like.new_tensor(_normalized(task_weights)), like)


def _normalized(task_weights: Sequence[float]) -> list[float]:
    total = math.fsum(task_weights)
    return [weight / total for weight in task_weights]
