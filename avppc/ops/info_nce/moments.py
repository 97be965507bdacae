"""Bilinear InfoNCE between clips that have several moments: the public op, its problem and its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from avppc.checks import check_bool, check_choice, check_integer, without_autocast
from avppc.ops.info_nce.cpu import info_nce_cpu_mean, info_nce_cpu_rows
from avppc.ops.info_nce.op import REDUCTIONS, InfoNCEStats, pick_backend, reduce_rows, shares_of
from avppc.ops.info_nce.problem import MomentProblem, Pairs, check_both_ids, check_embeddings, make_problem
from avppc.ops.info_nce.triton.op import info_nce_triton_rows

Candidates = Literal["clip", "moment", "both"]
CANDIDATES: tuple[Candidates, ...] = get_args(Candidates)
_CODES: dict[str, int] = {"clip": 1, "moment": 2, "both": 3}
OTHER_CLIPS = _CODES["moment"]
"""The bit of MomentProblem.candidates that says that other clips are among them."""


class Moments(NamedTuple):
    """Contexts and targets of some sub-tasks that score clips moment by moment."""

    tasks: tuple[int, ...]
    """P numbers of sub-tasks, from 0 to K - 1."""
    contexts: Tensor
    """[P, N, Tc, D], one for each sub-task in turn."""
    targets: Tensor
    """[P, N, Tz, D]"""
    further: int = 0
    """By which W they are scored: 0, the sub-task's own; i, the i-th of its further ones."""


def moment_info_nce(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    pairs: Pairs | None = None,
    *,
    candidates: Candidates | Sequence[Candidates] = "clip",
    shifts: int | Sequence[int] = 0,
    scale: float | Tensor = 1.0,
    positive_offset: int = 0,
    context_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    return_stats: bool = False,
) -> Any:
    """K InfoNCE losses with bilinear scores, where each moment of a clip must find its own among some others.

    In plain torch, for the sub-task k with (c, z) = (contexts[pairs[k, 0]], targets[pairs[k, 1]]), candidates "clip"
    and no shift:

        s = scale * (c @ weights[k].T) @ z.mT                                      # [N, T, T]: each clip by itself
        loss[k] = F.cross_entropy(s.flatten(0, 1), torch.arange(T).repeat(N), reduction="none").view(N, T)

    Cost and memory grow with N Tc (Tz + M) at most, where the logits of all moments with all would take N Tc M Tz.

    Args:
        contexts: [C, N, Tc, Dc], or [N, Tc, Dc] for a single one: N clips of Tc moments; float32, bfloat16, float16, or
            float64 (reference alone).
        targets: [U, M, Tz, Dz], or [M, Tz, Dz], with M >= N and Tz >= Tc; dtype and device as the contexts.
        weights: [K, Dz, Dc], or [Dz, Dc]; None scores by plain dot products (Dc == Dz).
        pairs: [K, 2], the (context index, target index) of each sub-task; None: sub-task k uses context k and target k.
        candidates: what a moment's positive is told from: "clip", the other moments of its own clip; "moment", the same
            moment of all other clips; "both". One for all sub-tasks, or K of them.
        shifts: the positive of moment t is moment t + shift of the clip's targets, 0 to Tz - Tc; one for all sub-tasks,
            or K of them. So a context of one moment predicts the moment `shift`.
        scale: multiplies the logits; a 0-d tensor receives a gradient.
        positive_offset: the targets of context clip n are those of target clip n + positive_offset; 0 to M - N.
        context_ids: [N] integers, given together with target_ids.
        target_ids: [M] integers: other clips with a context clip's id are left out of its negatives.
        reduction: "mean" for a 0-d loss; "task" for [K], the mean over clips and moments; "none" for [K, N, Tc].
        backend: "triton" (CUDA, compute capability 8.0 or more), "cpp" (CPU), "reference" (plain torch), or "auto":
            the fastest that can run.
        return_stats: also return InfoNCEStats.

    Returns:
        The loss, a Tensor of float32 (float64 for float64); with return_stats, (loss, InfoNCEStats).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the text names it.
        RuntimeError: the backend asked for is not available here.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_bool("return_stats", return_stats)
    problem = make_moment_problem(
        contexts,
        targets,
        weights,
        pairs,
        candidates,
        shifts,
        scale=scale,
        positive_offset=positive_offset,
        context_ids=context_ids,
        target_ids=target_ids,
    )
    loss, stats = solve_moments(problem, reduction, None, backend)
    return (loss, stats) if return_stats else loss


def make_moment_problem(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    pairs: Pairs | None = None,
    candidates: Candidates | Sequence[Candidates] = "clip",
    shifts: int | Sequence[int] = 0,
    *,
    scale: float | Tensor = 1.0,
    positive_offset: int = 0,
    context_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    normalize: str = "none",
) -> MomentProblem:
    """The checked problem of the arguments of moment_info_nce; `normalize` as in make_problem."""
    contexts = check_embeddings("contexts", contexts, "C", "N, Tc, Dc")
    targets = check_embeddings("targets", targets, "U", "M, Tz, Dz")
    rows = contexts.flatten(1, 2), targets.flatten(1, 2)
    flat = make_problem(*rows, weights, pairs, scale=scale, normalize=normalize)
    (clips, moments), (target_clips, target_moments) = contexts.shape[1:3], targets.shape[1:3]
    if target_clips < clips or target_moments < moments:
        raise ValueError(
            f"targets must have at least as many clips and moments as contexts, {clips} and {moments}; "
            f"got {target_clips} and {target_moments}"
        )
    check_integer("positive_offset", positive_offset, 0, target_clips - clips)
    context_ids, target_ids = check_both_ids(context_ids, target_ids, contexts, targets)
    return MomentProblem(
        *flat[:5],
        positive_offset,
        context_ids,
        target_ids,
        moments,
        target_moments,
        _candidate_codes(candidates, flat.tasks),
        _shifts(shifts, flat.tasks, target_moments - moments),
    )


def solve_moments(
    problem: MomentProblem, reduction: str, task_weights: Sequence[float] | None, backend: str
) -> tuple[Tensor, InfoNCEStats]:
    """The loss of a checked problem; task_weights (K numbers) weigh the sub-tasks in the reduction "mean"."""
    tasks, clips = len(problem.pairs), problem.contexts.shape[1] // problem.context_moments
    picked = pick_backend(problem, backend)
    if picked == "reference":
        with without_autocast(problem.contexts):
            rows, correct = moment_rows_reference(problem)
            loss = reduce_rows(rows, reduction, task_weights)
    elif picked == "cpp" and reduction == "mean":
        loss, statistics = info_nce_cpu_mean(problem, shares_of(task_weights, tasks, problem.scale))
        return loss, InfoNCEStats(*statistics.unbind())
    else:
        rows, correct = _ROWS[picked](problem)
        loss = reduce_rows(rows, reduction, task_weights)
    if reduction == "none":
        loss = loss.view(tasks, clips, problem.context_moments)
    return loss, InfoNCEStats(rows.detach().mean(1), correct.mean(1))


_ROWS = {"cpp": info_nce_cpu_rows, "triton": info_nce_triton_rows}
"""Of the compiled backends: losses, differentiable, and hits, as moment_rows_reference gives them."""


def moment_rows_reference(problem: MomentProblem) -> tuple[Tensor, Tensor]:
    """The definition: losses [K, N Tc], and 1 where the positive scores above every negative, a tie being a miss."""
    dtype = torch.promote_types(problem.contexts.dtype, torch.float32)
    contexts = problem.contexts.to(dtype).unflatten(1, (-1, problem.context_moments))
    targets = problem.targets.to(dtype).unflatten(1, (-1, problem.target_moments))
    losses, hits = [], []
    for task, (context, target) in enumerate(problem.pairs.tolist()):
        q = contexts[context]  # [N, Tc, Dc]
        if problem.weights is not None:
            q = q @ problem.weights[task].to(dtype).T
        code, shift = int(problem.candidates[task]), int(problem.shifts[task])
        s, positive = _logits(problem, q, targets[target], code, shift)
        positives = s.gather(2, positive[:, :, None])
        losses.append((s.logsumexp(2, keepdim=True) - positives).flatten())
        hits.append(((s >= positives).sum(2) == 1).to(dtype).flatten())
    return torch.stack(losses), torch.stack(hits)


def _logits(problem: MomentProblem, q: Tensor, z: Tensor, code: int, shift: int) -> tuple[Tensor, Tensor]:
    """Logits [N, Tc, columns] of one sub-task, and the column [N, Tc] of each positive.

    The columns are the Tz moments of the own clip, if `code` has them, then the same moment of all M clips, if it has
    those; the positive stands in the first part that is there, and is left out of the second.
    """
    clips, moments = q.shape[:2]
    own = torch.arange(clips, device=q.device) + problem.positive_offset
    parts = []
    if code & _CODES["clip"]:
        parts.append(problem.scale * (q @ z[own].mT))
    if code & _CODES["moment"]:
        across = problem.scale * torch.einsum("ntd,mtd->ntm", q, z[:, shift : shift + moments])
        left_out = torch.zeros(clips, len(z), dtype=torch.bool, device=q.device)
        if problem.context_ids is not None and problem.target_ids is not None:
            left_out = problem.context_ids[:, None] == problem.target_ids
        left_out = left_out.index_put((torch.arange(clips, device=q.device), own), torch.tensor(bool(parts)))
        parts.append(across.masked_fill(left_out[:, None, :], -torch.inf))
    if code & _CODES["clip"]:
        positive = (torch.arange(moments, device=q.device) + shift).expand(clips, -1)
    else:
        positive = own[:, None].expand(-1, moments)
    return torch.cat(parts, 2), positive


def _candidate_codes(candidates: Candidates | Sequence[Candidates], tasks: int) -> Tensor:
    names = (candidates,) * tasks if isinstance(candidates, str) else tuple(candidates)
    for name in names:
        check_choice("candidates", name, CANDIDATES)
    if len(names) != tasks:
        allowed = f"one of {', '.join(CANDIDATES)}, or {tasks} of them, one a sub-task"
        raise ValueError(f"candidates must be {allowed}; got {len(names)}")
    return torch.tensor([_CODES[name] for name in names], device="cpu")


def _shifts(shifts: int | Sequence[int], tasks: int, most: int) -> Tensor:
    values = tuple(shifts) if isinstance(shifts, Sequence) else (shifts,) * tasks
    for value in values:
        check_integer("shifts", value, 0, most)
    if len(values) != tasks:
        raise ValueError(f"shifts must be one number, or {tasks}, one a sub-task; got {len(values)}")
    return torch.tensor(values, dtype=torch.int64, device="cpu")
