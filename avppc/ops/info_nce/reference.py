"""The bilinear InfoNCE in plain torch: the definition, the fallback, and what the tests compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avppc.checks import without_autocast
from avppc.ops.info_nce.problem import Problem, loss_dtype
from avppc.ops.modes import is_plain, refuse_second_derivative

_MOST_LOGITS = 1 << 22  # at once, where they are computed for their maxima alone
_FEW_OF = 26  # a scatter of P rows is faster than a product with M columns up to P = M / 26 (one Zen 5 core, D = 256)


def info_nce_logits_reference(
    contexts: Tensor,  # [C, N, Dc]
    targets: Tensor,  # [U, M, Dz]
    weights: Tensor | None,  # [K, Dz, Dc]
    pairs: Tensor,  # [K, 2]
    scale: Tensor,  # []
    positive_offset: int,
    context_ids: Tensor | None,  # [N]
    target_ids: Tensor | None,  # [M]
) -> Tensor:  # [K, N, M]
    """s[k, i, j] = scale * z_j^T W_k c_i; -inf where target j has the id of context i and is not its positive."""
    dtype = torch.promote_types(contexts.dtype, torch.float32)  # losses are float32 or better, whatever comes in
    c = contexts.to(dtype)[pairs[:, 0]]
    z = targets.to(dtype)[pairs[:, 1]]
    q = c if weights is None else c @ weights.to(dtype).mT
    s = scale * (q @ z.mT)
    if context_ids is not None and target_ids is not None:
        same = context_ids[:, None] == target_ids[None, :]
        if positive_offset >= 0:
            same = same.diagonal_scatter(torch.zeros_like(context_ids, dtype=torch.bool), positive_offset)
        s = s.masked_fill(same, -torch.inf)
    return s


def info_nce_rows_reference(s: Tensor, positive_offset: int, symmetric: bool) -> Tensor:  # [K, N, M] -> [K, N]
    """loss[k, i] = logsumexp_j s[k, i, j] - s[k, i, i + positive_offset]; symmetric: averaged with column i's loss."""
    loss = -s.log_softmax(2).diagonal(positive_offset, 1, 2)
    if symmetric:
        loss = (loss - s.log_softmax(1).diagonal(0, 1, 2)) / 2
    return loss


def info_nce_accuracy_reference(s: Tensor, positive_offset: int) -> Tensor:  # [K, N, M] -> [K]
    """The share of rows whose positive scores above every negative; a tie is a miss, so a collapse scores 0."""
    positive = s.diagonal(positive_offset, 1, 2)
    at_least = (s >= positive[:, :, None]).sum(2)
    return (at_least == 1).to(s.dtype).mean(1)


def info_nce_positive_rows_reference(
    s: Tensor,  # [K, N, M], nothing left out
    positives: Tensor,  # [N, P]: numbers of targets, -1 for none
    context_ids: Tensor | None,  # [N]
    target_ids: Tensor | None,  # [M]
) -> Tensor:  # [K, N]
    """loss[k, i] = logsumexp_j s[k, i, j] - mean_p s[k, i, positives[i, p]]; equal ids are left out of the sum, unless
    they are positives."""
    listed = positives >= 0
    own = s.gather(2, positives.clamp_min(0).expand(len(s), -1, -1))
    mean = own.masked_fill(~listed, 0.0).sum(2) / listed.sum(1)
    if context_ids is not None and target_ids is not None:
        same = (context_ids[:, None] == target_ids).scatter(1, filled(positives), False)
        s = s.masked_fill(same, -torch.inf)
    return s.logsumexp(2) - mean


def filled(positives: Tensor) -> Tensor:  # [N, P] -> [N, P]
    """Positives with another one of their row in place of each -1."""
    return torch.where(positives < 0, positives.amax(1, keepdim=True), positives)


def positive_hits(
    s: Tensor,  # [K, N, M], nothing left out
    positives: Tensor,  # [N, P]: numbers of targets, -1 for none
    context_ids: Tensor | None,  # [N]
    target_ids: Tensor | None,  # [M]
) -> Tensor:  # [K, N]
    """1 where the best positive scores above every negative, as info_nce_accuracy_reference counts them."""
    index = filled(positives).expand(len(s), -1, -1)
    best = s.gather(2, index).amax(2)
    negatives = s.scatter(2, index, -torch.inf)
    if context_ids is not None and target_ids is not None:
        negatives = negatives.masked_fill(context_ids[:, None] == target_ids, -torch.inf)
    return (best > negatives.amax(2)).to(s.dtype)


class BilinearScores(NamedTuple):
    """What bilinear_scores finds in each row of logits."""

    log_sum_exp: Tensor
    """[K, N] logsumexp_j s[k, i, j], in nats, with gradient; -inf where all targets are left out."""
    argmax: Tensor
    """[K, N] int64, the target that scores highest, the first of equal ones; -1 where all are left out."""


def best_targets(s: Tensor) -> Tensor:  # [K, N, M] -> [K, N]
    """The number of the target that scores highest, the first of equal ones; -1 where all are left out."""
    found = s.max(2)
    return found.indices.masked_fill(found.values == -torch.inf, -1)


def map_logits(problem: Problem, function: Callable[[Tensor, slice], Tensor]) -> Tensor:  # -> [K, N]
    """function(logits [k, n, M], their rows) -> [k, n] over all logits, of which some are computed at a time."""
    K, N, M = problem.tasks, problem.rows, problem.targets.shape[1]
    with torch.no_grad(), without_autocast(problem.contexts):
        if K * N * M <= _MOST_LOGITS:
            return function(info_nce_logits_reference(*problem[:-1]), slice(None))
        blocks = _blocks(N, M)
        found = [torch.cat([function(_logits_of(problem, k, rows), rows) for rows in blocks], 1) for k in range(K)]
        return torch.cat(found)


def _blocks(N: int, M: int) -> list[slice]:
    """Rows, in parts whose M columns are _MOST_LOGITS at most, or one row each."""
    if N * M <= _MOST_LOGITS:  # asked before any division: a compiled graph is for many sizes
        return [slice(None)]
    step = max(1, _MOST_LOGITS // M)
    return [slice(first, first + step) for first in range(0, N, step)]


def _logits_of(problem: Problem, task: int, rows: slice) -> Tensor:  # [1, n, M]
    context, target = (of_pairs(value, problem.pairs[task : task + 1], side) for side, value in enumerate(problem[:2]))
    weights = None if problem.weights is None else problem.weights[task : task + 1]
    ids = None if problem.context_ids is None else problem.context_ids[rows]
    pairs = problem.pairs.new_zeros(1, 2)
    settings = pairs, problem.scale, problem.positive_offset, ids, problem.target_ids
    return info_nce_logits_reference(context[:, rows], target, weights, *settings)


def of_pairs(embeddings: Tensor, pairs: Tensor, side: int) -> Tensor:  # [sets, n, D] -> [K, n, D]
    """The contexts (side 0) or targets (side 1) of each sub-task."""
    if len(embeddings) == 1:
        return embeddings.expand(len(pairs), -1, -1)
    return embeddings[pairs[:, side].to(embeddings.device)]


def mean_positive_scores(problem: Problem, positives: Tensor) -> Tensor:  # [K, N]
    """mean_p s[k, i, positives[i, p]], by the mean of the positives' embeddings: nothing here has the size N x M."""
    listed = (positives >= 0).to(loss_dtype(problem.targets))
    share = listed / listed.sum(1, keepdim=True)
    means: Tensor = _WeightedSums.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        problem.targets.to(share.dtype), positives.clamp_min(0), share
    )
    return problem.scale * (_queries(problem) * of_pairs(means, problem.pairs, 1)).sum(2)


class _WeightedSums(torch.autograd.Function):
    """[U, N, D] sums over p of share[i, p] z[u, index[i, p]]; z is [U, M, D]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(index, share)
        sets, ctx.columns, width = z.shape
        rows = torch.arange(sets, device=z.device)[:, None, None] * ctx.columns + index
        shares = share.repeat(sets, 1)
        sums = F.embedding_bag(rows.flatten(0, 1), z.flatten(0, 1), mode="sum", per_sample_weights=shares)
        return sums.view(sets, -1, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative("bilinear_info_nce", "use backend='reference' with create_graph=True")
        index, share = ctx.saved_tensors
        N, M = len(index), ctx.columns
        dz = gradient.new_zeros(len(gradient), M, gradient.shape[2])  # a batch of them where the gradient is one
        if index.is_cpu and index.shape[1] * _FEW_OF <= M:
            terms = share[:, :, None] * gradient[:, :, None]
            return dz.index_add(1, index.flatten(), terms.flatten(1, 2)), None, None
        # many a row: products are faster than a scatter of rows, and give the same bits each time on a GPU, too
        for rows in _blocks(N, M):
            shares = share.new_zeros(len(index[rows]), M).scatter_add(1, index[rows], share[rows])
            dz = dz + shares.T @ gradient[:, rows]
        return dz, None, None


def left_out_positive_scores(problem: Problem, positives: Tensor) -> Tensor | None:  # [K, N, P]
    """s[k, i, positives[i, p]] of the positives that have their context's id, each once; -inf of the others.

    None where there are none: as far as their values may be read, for on a GPU that would take waiting for it.
    """
    if problem.context_ids is None or problem.target_ids is None:
        return None
    wanted = _have_context_id(problem, positives)
    if wanted.is_cpu and is_plain(wanted) and not wanted.any():
        return None
    positives = positives.sort(1).values
    again = F.pad(positives[:, 1:] == positives[:, :-1], (1, 0))
    z = problem.targets[:, positives.clamp_min(0)].flatten(1, 2)
    z = of_pairs(z, problem.pairs, 1).to(loss_dtype(z)).unflatten(1, positives.shape)
    s = problem.scale * torch.einsum("knd,knpd->knp", _queries(problem), z)
    return s.masked_fill(again | ~_have_context_id(problem, positives), -torch.inf)


def _have_context_id(problem: Problem, positives: Tensor) -> Tensor:  # [N, P]
    assert problem.context_ids is not None
    assert problem.target_ids is not None
    return (problem.target_ids[positives.clamp_min(0)] == problem.context_ids[:, None]) & (positives >= 0)


def _queries(problem: Problem) -> Tensor:  # [K, N, Dz]
    """W_k c_i, in the precision of the losses."""
    dtype = loss_dtype(problem.contexts)
    c = of_pairs(problem.contexts, problem.pairs, 0).to(dtype)
    return c if problem.weights is None else c @ problem.weights.to(dtype).mT
