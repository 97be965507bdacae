"""Does time run forward or backward?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avppc.clip import ClipBatch
from avppc.draws import uniform
from avppc.tasks.base import ElementTask
from avppc.tasks.base_protocol import TaskOutput
from avppc.tasks.cuts_spans import cut_video, draw_starts
from avppc.tasks.pairs import binary_figures, binary_output
from avppc.train.config import PretrainConfig


class TimeArrowTask(ElementTask):
    """Each clip is shown as it was or reversed, with even chances; only the order of the frames tells which.

    Reference: Wei, Lim, Zisserman, Freeman, "Learning and Using the Arrow of Time", CVPR 2018.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config, hears=False)
        dim = config.objective.dim
        if config.rivals.arrow_pool == "mean":
            self.video_pool = _MeanPool(config.encoder.features, dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    @property
    def frames_needed(self) -> int:
        return self.shortest_span

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """In evaluation every other clip is reversed."""
        count = len(batch)
        reversed_ = torch.arange(count) % 2 == 1
        if self.training:
            reversed_ = uniform(count, 0.0, 1.0, generator, reversed_.device) < 0.5
        return binary_output(self.arrow(batch, reversed_, generator), (~reversed_).to(batch.device))

    def arrow(self, batch: ClipBatch, reversed_: Tensor, generator: torch.Generator) -> Tensor:
        """Logits [N] of "forward", with the clips that reversed_ [N] marks shown backward."""
        jitter = self.config.augment.time_jitter_frames
        frames = batch.video.shape[1] - jitter
        starts = draw_starts(len(batch), jitter, generator, training=self.training)
        video = cut_video(batch.video, starts, frames)
        chosen = reversed_.to(video.device)
        video[chosen] = video[chosen].flip(1)
        return self.head(self.see(video, generator)).squeeze(1)

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return binary_figures(row)


class _MeanPool(nn.Module):
    """The mean of the frames, mapped to the embedding width: [N, T, features] -> [N, dim], blind to their order."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.mean(1))
