"""The loss and the metric of tasks with two answers, and what tasks share that ask whether two things match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.tasks.base import ElementTask
from avppc.tasks.base_protocol import TaskOutput
from avppc.train.config import PretrainConfig


class PairScore(nn.Module):
    """Does this picture belong to this sound: embeddings [..., D] and [..., D] -> logits [...]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dim, dim)
        self.answer = nn.Linear(dim, 1)

    def forward(self, seen: Tensor, heard: Tensor) -> Tensor:
        return self.answer(self.hidden(torch.cat([seen, heard], -1)).relu()).squeeze(-1)

    def every_pair(self, seen: Tensor, heard: Tensor) -> Tensor:  # [N, D], [M, D] -> [N, M]
        """Logits of each picture with each sound."""
        first, second = self.hidden.weight.chunk(2, 1)
        parts = (seen @ first.T)[:, None] + (heard @ second.T + self.hidden.bias)[None]
        return self.answer(parts.relu()).squeeze(-1)


def binary_output(logits: Tensor, truth: Tensor) -> TaskOutput:  # [N], [N] 0 or 1
    """Cross-entropy, and the share of right answers; a logit of exactly 0 is no answer and counts one half."""
    loss = functional.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype))
    with torch.no_grad():
        right = 0.5 + 0.5 * torch.sign(logits) * (2.0 * truth - 1.0)
    return TaskOutput(loss, {"right": right.mean()})


class PairTask(ElementTask):
    """Does this picture belong to this sound? As many true pairs as false ones in every batch."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.head = PairScore(config.objective.dim)

    def judge(self, seen: Tensor, heard: Tensor, false: Tensor) -> TaskOutput:
        """The loss of embeddings [N, D]: in each row `heard` belongs to `seen`, and `false` does not."""
        logits = self.head(torch.cat([seen, seen]), torch.cat([heard, false]))
        truth = torch.arange(len(logits), device=logits.device) < len(seen)
        return binary_output(logits, truth)

    @property
    def matches(self) -> bool:
        return True

    def match(self, seen: Tensor, heard: Tensor) -> Tensor:
        return self.head.every_pair(seen, heard)

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return binary_figures(row)


def binary_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What the progress bar shows."""
    return {"right": row["right"]}
