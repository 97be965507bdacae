"""What pretraining asks of a proxy task, and what every task is built from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from avppc.clip import ClipBatch
from avppc.models.video import VideoEncoder


@dataclass(frozen=True, eq=False)
class TaskOutput:
    """The result of one batch."""

    loss: Tensor
    """0-d, with gradient."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached figures to log, each 0-d or [K]; they stay on the device until they are logged."""


Representations = Sequence[Tensor | None]
"""Tensors [N, ...], a row a clip; None for what the task does not use."""


class ProxyTask(nn.Module, ABC):
    """A task that needs no labels. It owns the visual encoder, which is kept, and whatever else it trains beside it."""

    video_encoder: VideoEncoder

    @abstractmethod
    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """The loss of a batch of whole clips.

        Args:
            generator: the source of every random draw; what belongs to one clip is drawn by avppc.draws.
        """

    @property
    def frames_needed(self) -> int:
        """Frames of the shortest clips that the task can learn from."""
        return 1

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """What the encoders make of each clip by itself, each [N, ...]; `score` needs nothing else of the clips.

        A task that has both this and `score` can learn from batches that do not pass through its encoders at once.
        """
        raise NotImplementedError

    def score(self, representations: Representations, batch: ClipBatch) -> TaskOutput:
        """The loss of a batch from its representations: what `forward` gives."""
        raise NotImplementedError

    @property
    def has_representations(self) -> bool:
        """Whether the task has `represent` and `score`."""
        return type(self).represent is not ProxyTask.represent

    def describe(self) -> dict[str, list[str]]:
        """The names of the entries of each [K] metric, by metric; the report and the log use them."""
        return {}

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """A few shares from 0 to 1 out of a row of logged metrics, for the progress bar."""
        return {}
