"""Spans of clips, and the four elements of a clip: the pictures and the sound of its past and of its future.

The cut comes before anything with a reach in time (features, motion, convolutions), or the past would know the future.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avppc.checks import check_integer
from avppc.clip import SAMPLES_PER_FRAME, ClipBatch
from avppc.draws import integers
from avppc.ops.clips import cut_spans
from avppc.tasks.config import CutConfig


@dataclass(frozen=True, eq=False)
class Elements:
    """Past and future of N clips, stacked along the first dimension: rows 0 to N-1 past, N to 2N-1 future."""

    video: Tensor
    """[2 N, T', H, W] uint8 luma."""
    audio: Tensor
    """[2 N, 640 T'] int16."""

    def __len__(self) -> int:
        return len(self.video) // 2


def cut_elements(
    batch: ClipBatch, cut: CutConfig, *, jitter_frames: int = 0, generator: torch.Generator | None = None
) -> Elements:
    """Past and future of each clip, sound over the same span as the picture.

    Args:
        jitter_frames: elements are this many frames shorter than the cut allows; each element of each clip starts at a
            random one of the frames this frees, or at the middle one without a generator.

    Raises:
        ValueError: the clips are shorter than the cut, or the jitter leaves fewer than two frames.
    """
    if not isinstance(batch, ClipBatch):
        raise TypeError(f"batch must be a ClipBatch, got {type(batch).__name__}")
    if not isinstance(cut, CutConfig):
        raise TypeError(f"cut must be a CutConfig, got {type(cut).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    check_integer("jitter_frames", jitter_frames, 0)
    count, frames = len(batch), batch.video.shape[1]
    length = cut.past_frames - jitter_frames
    if frames < cut.frames:
        raise ValueError(f"batch must have clips of {cut.frames} frames for past, gap and future; they have {frames}")
    if length < 2:
        raise ValueError(f"jitter_frames must leave at least 2 of {cut.past_frames} frames, got {jitter_frames}")
    if generator is None or jitter_frames == 0:
        starts = torch.full((2 * count,), jitter_frames // 2, device=batch.device)
    else:
        starts = integers(2 * count, 0, jitter_frames, generator, batch.device)
    starts[count:] += cut.future_start
    sound = batch.audio.unflatten(1, (frames, SAMPLES_PER_FRAME))
    return Elements(cut_spans(batch.video, starts, length), cut_spans(sound, starts, length).flatten(1))


def cut_video(
    video: Tensor,  # [N, T, H, W]
    starts: Tensor,  # [N] first frame of each clip's span
    frames: int,
) -> Tensor:
    """Spans [N, frames, H, W]."""
    _check_starts(starts, len(video), video.shape[1] - frames)
    return cut_spans(video, starts, frames)


def cut_audio(
    audio: Tensor,  # [N, S]
    starts: Tensor,  # [N] first video frame of each clip's span
    frames: int,
) -> Tensor:
    """Spans [N, 640 frames] over the video frames from `starts` on."""
    whole = audio.shape[1] // SAMPLES_PER_FRAME
    _check_starts(starts, len(audio), whole - frames)
    sound = audio[:, : whole * SAMPLES_PER_FRAME].unflatten(1, (whole, SAMPLES_PER_FRAME))
    return cut_spans(sound, starts, frames).flatten(1)


def _check_starts(starts: Tensor, count: int, last: int) -> None:
    if starts.shape != (count,) or last < 0 or int(starts.min()) < 0 or int(starts.max()) > last:
        raise ValueError(f"starts must be {count} frames from 0 to {last}, got {starts.tolist()}")


def draw_starts(count: int, last: int, generator: torch.Generator, *, training: bool = True) -> Tensor:
    """[N] first frames from 0 to `last`: drawn, or the middle one in evaluation."""
    if not training:
        return torch.full((count,), last // 2)
    return integers(count, 0, last, generator, torch.device("cpu"))


def draw_shifted(
    starts: Tensor,  # [N] where the pictures start
    last: int,
    least: int,
    most: int,
    generator: torch.Generator,
) -> Tensor:
    """[N] other starts from 0 to `last`, `least` to `most` frames away from `starts`, all of them equally likely.

    If a start has no such other, the farthest one is taken.
    """
    places = torch.arange(last + 1)
    distance = (places - starts[:, None]).abs()
    allowed = (distance >= least) & (distance <= most)
    farthest = distance == distance.amax(1, keepdim=True)
    allowed = torch.where(allowed.any(1, keepdim=True), allowed, farthest)
    number = integers(len(starts), 1, allowed.sum(1), generator, starts.device)  # of the allowed places, counted from 1
    return (allowed.cumsum(1) == number[:, None]).int().argmax(1)
