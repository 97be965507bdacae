"""Do this picture and this sound come from the same clip?"""

from __future__ import annotations

import torch
from torch import Tensor

from avppc.clip import ClipBatch
from avppc.tasks.base_protocol import TaskOutput
from avppc.tasks.pairs import PairTask


class CorrespondenceTask(PairTask):
    """Is this sound of the picture's clip and time, or of another clip? As many true pairs as false ones in a batch.

    Reference: Arandjelović, Zisserman, "Look, Listen and Learn", ICCV 2017.
    """

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        count = len(batch)
        elements = self.cut(batch, generator)
        seen = self.see(elements.video, generator)
        heard = self.hear(elements.audio, generator)
        other = draw_other_clips(batch.clip_ids.cpu(), generator).to(batch.device)
        # Rows 0 to N - 1 are of the past and the others of the future: each half draws its other clips from itself.
        return self.judge(seen, heard, heard[torch.cat([other, other + count])])


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
