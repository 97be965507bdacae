"""Spans of clips: picture and sound cut at frames of one's choice, each clip at its own."""

from __future__ import annotations

import torch
from torch import Tensor

from avppc.clip import SAMPLES_PER_FRAME
from avppc.data.draws import integers


def cut_video(
    video: Tensor,  # [N, T, H, W]
    starts: Tensor,  # [N] first frame of each clip's span
    frames: int,
) -> Tensor:
    """Spans [N, frames, H, W]."""
    _check_starts(starts, len(video), video.shape[1] - frames)
    spans = video.new_empty(len(video), frames, *video.shape[2:])
    for clip, start in enumerate(starts.tolist()):
        spans[clip] = video[clip, start : start + frames]
    return spans


def cut_audio(
    audio: Tensor,  # [N, S]
    starts: Tensor,  # [N] first video frame of each clip's span
    frames: int,
) -> Tensor:
    """Spans [N, 640 frames] over the video frames from `starts` on."""
    _check_starts(starts, len(audio), audio.shape[1] // SAMPLES_PER_FRAME - frames)
    spans = audio.new_empty(len(audio), frames * SAMPLES_PER_FRAME)
    for clip, start in enumerate(starts.tolist()):
        spans[clip] = audio[clip, start * SAMPLES_PER_FRAME : (start + frames) * SAMPLES_PER_FRAME]
    return spans


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
    """[N] other starts from 0 to `last`, `least` to `most` frames from `starts`, each such place as likely.

    Where a start has no such place, the farthest one there is.
    """
    places = torch.arange(last + 1)
    distance = (places - starts[:, None]).abs()
    allowed = (distance >= least) & (distance <= most)
    farthest = distance == distance.amax(1, keepdim=True)
    allowed = torch.where(allowed.any(1, keepdim=True), allowed, farthest)
    number = integers(len(starts), 1, allowed.sum(1), generator, starts.device)  # of the allowed places, counted from 1
    return (allowed.cumsum(1) == number[:, None]).int().argmax(1)
