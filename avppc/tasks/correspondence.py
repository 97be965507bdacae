"""Do this picture and this sound come from the same clip?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from avppc.clip import ClipBatch
from avppc.config.pretrain import PretrainConfig
from avppc.tasks.binary import PairScore, binary_figures, binary_output
from avppc.tasks.element_task import ElementTask
from avppc.tasks.protocol import TaskOutput


class CorrespondenceTask(ElementTask):
    """Picture and sound of the same clip over the same time, against the sound of another clip; as many of each.

    Reference: Arandjelović, Zisserman, "Look, Listen and Learn", ICCV 2017.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.head = PairScore(config.objective.dim)

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        count = len(batch)
        elements = self.cut(batch, generator)
        seen = self.see(elements.video, generator)
        heard = self.hear(elements.audio, generator)
        other = draw_other_clips(batch.clip_ids.cpu(), generator).to(batch.device)
        # Rows 0 to N - 1 are of the past and the others of the future: each half looks for strangers in itself.
        strangers = heard[torch.cat([other, other + count])]
        logits = self.head(torch.cat([seen, seen]), torch.cat([heard, strangers]))
        truth = torch.arange(len(logits), device=logits.device) < len(seen)
        return binary_output(logits, truth)

    @property
    def matches(self) -> bool:
        return True

    def match(self, seen: Tensor, heard: Tensor) -> Tensor:
        return self.head.every_pair(seen, heard)

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return binary_figures(row)


def draw_other_clips(clip_ids: Tensor, generator: torch.Generator) -> Tensor:
    """[N] numbers of rows of other clips, each other clip as likely.

    Raises:
        ValueError: a row has no other clip in the batch.
    """
    allowed = clip_ids[:, None] != clip_ids[None, :]
    if not bool(allowed.any(1).all()):
        raise ValueError("correspondence needs at least two different clips in a batch, clip_ids has one")
    draws = torch.rand(allowed.shape, generator=generator).masked_fill_(~allowed, -1.0)
    return draws.argmax(1)
