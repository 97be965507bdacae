"""Spans of clips: picture and sound, each clip cut at a frame of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from avppc.clip import SAMPLES_PER_FRAME
from avppc.draws import integers
from avppc.ops.clips import cut_spans


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
