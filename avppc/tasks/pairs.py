"""Tasks with two answers: does this sound belong to this picture, and does time run forward?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.clip import ClipBatch
from avppc.draws import uniform
from avppc.tasks.base import ProxyTask, TaskOutput
from avppc.tasks.config import TaskConfig
from avppc.tasks.cuts import cut_video, draw_starts


class PairScore(nn.Module):
    """Does this picture belong to this sound: embeddings [..., D] and [..., D] -> logits [...]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dim, dim)
        self.answer = nn.Linear(dim, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        return self.answer(self.hidden(torch.cat([video, audio], -1)).relu()).squeeze(-1)

    def every_pair(self, video: Tensor, audio: Tensor) -> Tensor:  # [N, D], [M, D] -> [N, M]
        """Logits of each picture with each sound."""
        first, second = self.hidden.weight.chunk(2, 1)
        parts = (video @ first.T)[:, None] + (audio @ second.T + self.hidden.bias)[None]
        return self.answer(parts.relu()).squeeze(-1)


def binary_output(logits: Tensor, truth: Tensor) -> TaskOutput:  # [N], [N] 0 or 1
    """Cross-entropy, with the share of right answers as a metric; a logit of exactly 0 counts as half right."""
    loss = functional.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype))
    with torch.no_grad():
        right = 0.5 + 0.5 * torch.sign(logits) * (2.0 * truth - 1.0)
    return TaskOutput(loss, {"right": right.mean()})


class PairTask(ProxyTask):
    """Does this picture belong to this sound? As many true pairs as false ones in every batch."""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.head = PairScore(config.objective.dim)

    def pair_loss(self, video: Tensor, audio: Tensor, false: Tensor) -> TaskOutput:
        """The loss of embeddings [N, D]: in each row the sound `audio` belongs to the pictures, `false` does not."""
        logits = self.head(torch.cat([video, video]), torch.cat([audio, false]))
        truth = torch.arange(len(logits), device=logits.device) < len(video)
        return binary_output(logits, truth)

    def pair_scores(self, video: Tensor, audio: Tensor) -> Tensor:
        return self.head.every_pair(video, audio)

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return share_right(row)


def share_right(row: Mapping[str, Any]) -> dict[str, float]:
    """Out of a row of logged metrics: the share of right answers, which the progress bar shows."""
    return {"right": row["right"]}


class CorrespondenceTask(PairTask):
    """Is this sound of the picture's clip and time, or of another clip? As many true pairs as false ones in a batch.

    Reference: Arandjelović, Zisserman, "Look, Listen and Learn", ICCV 2017.
    """

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        count = len(batch)
        elements = self.cut(batch, generator)
        video = self.embed_video(elements.video, generator)
        audio = self.embed_audio(elements.audio, generator)
        other = draw_other_clips(batch.clip_ids.cpu(), generator).to(batch.device)
        # Rows 0 to N - 1 are of the past and the others of the future: each half draws its other clips from itself.
        return self.pair_loss(video, audio, audio[torch.cat([other, other + count])])


def draw_other_clips(clip_ids: Tensor, generator: torch.Generator) -> Tensor:
    """[N] row numbers of other clips, each other clip equally likely.

    Raises:
        ValueError: a row has no other clip in the batch.
    """
    allowed = clip_ids[:, None] != clip_ids[None, :]
    if not bool(allowed.any(1).all()):
        raise ValueError("correspondence needs at least two different clips in a batch, clip_ids has one")
    draws = torch.rand(allowed.shape, generator=generator).masked_fill_(~allowed, -1.0)
    return draws.argmax(1)


class TimeArrowTask(ProxyTask):
    """Each clip is shown as it was or reversed, with even chances; only the order of the frames tells which.

    Reference: Wei, Lim, Zisserman, Freeman, "Learning and Using the Arrow of Time", CVPR 2018.
    """

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config, with_audio=False)
        dim = config.objective.dim
        if config.baselines.arrow_pool == "mean":
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
        return self.head(self.embed_video(video, generator)).squeeze(1)

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return share_right(row)


class _MeanPool(nn.Module):
    """The mean of the frames, mapped to the embedding width: [N, T, features] -> [N, dim], blind to their order."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.mean(1))
