"""Clips decoded when they are asked for, instead of packed shards: for a first look, or where the disk is small."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from avppc.checks import check_integer
from avppc.clip import CLIP_FRAMES, NO_LABEL, Clip, ClipBatch
from avppc.data.prepare.worker import clip_id
from avppc.data.scan import Video
from avppc.data.video.crop import Crop
from avppc.data.video.decode import Backend, decode_clip


@dataclass(frozen=True)
class VideoClip:
    """A clip that is still in its video."""

    path: Path
    start_frame: int = 0
    """In frames of 1/25 s from the video's first."""
    label: int = NO_LABEL
    clip_id: int = 0
    speaker: int = -1


def first_clips(root: Path, videos: Sequence[Video]) -> list[VideoClip]:
    """The clip at the start of each video of a scan, with the ids that `avppc prepare` gives them."""
    return [VideoClip(root / v.path, 0, v.label, clip_id(v.path), v.speaker) for v in videos]


class VideoDataset:
    """Decodes batches of clips on threads; takes the place of a PackedDataset in a ClipLoader.

    Raises (in batch):
        DecodeError: a clip cannot be decoded; `avppc index` tells such videos beforehand.
    """

    def __init__(
        self,
        clips: Sequence[VideoClip],
        *,
        num_frames: int = CLIP_FRAMES,
        crop: Crop | None = None,
        backend: Backend = "pyav",
        threads: int = 0,
    ) -> None:
        check_integer("threads", threads, 0, 1024)
        self.clips = tuple(clips)
        self.num_frames = num_frames
        self.crop = crop or Crop()
        self.backend: Backend = backend
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="avppc-decode")

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: Tensor, *, pin_memory: bool = False) -> ClipBatch:
        """The clips of the given numbers, in that order."""
        batch = ClipBatch.stack(list(self._pool.map(self._decode, indices.tolist())))
        return batch.pin_memory() if pin_memory else batch

    def _decode(self, number: int) -> Clip:
        clip = self.clips[number]
        found = decode_clip(
            clip.path,
            start_frame=clip.start_frame,
            num_frames=self.num_frames,
            crop=self.crop,
            backend=self.backend,
        )
        return Clip(found.video, found.audio, clip.label, clip.clip_id, clip.speaker)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def as_batch(clips: Sequence[VideoClip], video: Tensor, audio: Tensor) -> ClipBatch:
    """A batch on the video's device."""
    numbers = torch.tensor([[clip.label, clip.clip_id, clip.speaker] for clip in clips]).to(video.device)
    return ClipBatch(video, audio.to(video.device), *(numbers[:, column].contiguous() for column in range(3)))
