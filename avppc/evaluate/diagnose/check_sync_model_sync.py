"""The offset between sound and picture of a data set, by a pretrained model's own score of how well the two fit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from avppc.clip import ClipBatch
from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.diagnose.check_sync_sync import SyncEstimate, chosen_rows, make_estimate, video_numbers
from avppc.evaluate.diagnose.task import TrainedTask
from avppc.train.hardware import autocast

_BATCH = 64


@torch.inference_mode()
def estimate_offset_by_model(
    trained: TrainedTask, dataset: PackedDataset, clips: int, max_offset_frames: int
) -> SyncEstimate:
    """The shift of the sound at which the model finds it to fit the picture best.

    The model finds the shift that it was trained with, so it must come from data that are in sync.

    Args:
        clips: the most clips to look at.
        max_offset_frames: largest shift to either side, as far as the clips have room beside the model's spans.

    Raises:
        ValueError: the run's task does not compare sound and picture, or the clips are too short for its spans.
    """
    rows = chosen_rows(dataset, clips)
    parts = []
    for indices in torch.from_numpy(rows).split(_BATCH):
        with autocast(trained.device, trained.bf16):
            parts.append(_offset_scores(trained, dataset.batch(indices).to(trained.device)).float().cpu())
    scores = torch.cat(parts).double().numpy()  # [n, L]
    step = 1 if trained.task.matches else trained.task.offset_frames
    middle = scores.shape[1] // 2
    reach = min(max_offset_frames // step, middle)
    scores = scores[:, middle - reach : middle + reach + 1]
    scores -= scores.mean(1, keepdims=True)
    scores /= np.maximum(scores.std(1, keepdims=True), 1e-12)
    return make_estimate(step * np.arange(-reach, reach + 1), scores, video_numbers(dataset, rows), "model")


def _offset_scores(trained: TrainedTask, batch: ClipBatch) -> Tensor:
    """[N, L] how well each sound fits its picture, less how well it fits the batch's pictures on average.

    The latter is subtracted because some sounds, silence among them, score higher than others whatever is seen.
    """
    task, generator = trained.task, trained.generator()
    if not task.matches:
        scores = task.offset_scores(batch, generator)
        if scores is None:
            raise ValueError(f"run: its task, {trained.config.task}, does not compare sound and picture")
        return scores
    frames = task.span_frames
    if batch.video.shape[1] < frames + 2:
        raise ValueError(f"run: it looks at {frames} frames, clips of {batch.video.shape[1]} leave no room for shifts")
    return torch.stack([pairs.diagonal() - pairs.mean(0) for pairs in task.offset_pairs(batch, generator)], 1)
