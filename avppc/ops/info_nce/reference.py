"""The bilinear InfoNCE in plain torch: the definition, the fallback, and what the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor


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
