"""Retrieval, nearest neighbours and accuracy among chosen candidates: plain arithmetic on scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ranks_of_positives(scores: Tensor) -> Tensor:  # [..., N, M], the positive of row i in column i
    """[..., N] how many other candidates score at least as high as the positive: 0 is the best.

    A tie counts against the positive, so that equal scores are no success.
    """
    positives = scores.diagonal(dim1=-2, dim2=-1)
    return (scores >= positives.unsqueeze(-1)).sum(-1) - 1


def recall_at(scores: Tensor, counts: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:  # [N, M]
    """R@k for each k, 0 to 1, and the median rank, 1 being the best."""
    ranks = ranks_of_positives(scores)
    found = {f"r@{count}": (ranks < count).float().mean().item() for count in counts}
    return {**found, "median_rank": ranks.float().median().item() + 1}


def accuracy_among(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:  # [K, N, M], [N, M] bool
    """Accuracy among certain candidates, and the accuracy expected among as many drawn from all others.

    Args:
        scores: the positive of row i is column i.
        allowed: the candidates of row i beside its positive; rows without one do not count.

    Returns:
        Two [K]: the share of rows whose positive beats all allowed candidates; and its expected value for as many
        candidates drawn at random, without replacement, from all that are not the positive.
    """
    others = ~torch.eye(*allowed.shape, dtype=torch.bool, device=allowed.device)
    allowed = allowed & others
    rows = allowed.any(1)
    beaten = scores.diagonal(dim1=1, dim2=2).unsqueeze(2) > scores  # [K, N, M]
    won = (beaten | ~allowed).all(2)[:, rows].double().mean(1)
    # C(b, m) / C(o, m): m candidates out of o, all of them among the b that are beaten
    m = allowed.sum(1).double()
    o = others.sum(1).double()
    b = (beaten & others).sum(2).double()
    chance = torch.exp(_log_choose(b.clamp_min(0), m) - _log_choose(o, m))
    chance = torch.where(b >= m, chance, torch.zeros_like(chance))
    return won, chance[:, rows].mean(1)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of the binomial coefficient, for n >= k; anything finite for n < k."""
    n = torch.maximum(n, k)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def vote_of_neighbours(
    train: Tensor,  # [n, D]
    labels: Tensor,  # [n] from 0
    test: Tensor,  # [m, D]
    neighbours: int,
) -> Tensor:
    """[m] the word with most votes of the nearest training clips by cosine, each vote weighted by exp(10 cosine)."""
    similarity = functional.normalize(test, dim=1) @ functional.normalize(train, dim=1).T
    weights, nearest = similarity.topk(min(neighbours, len(train)), 1)
    votes = torch.zeros(len(test), int(labels.max()) + 1, dtype=weights.dtype)
    votes.scatter_add_(1, labels[nearest], (10.0 * weights).exp())
    return votes.argmax(1)
