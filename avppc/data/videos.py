"""Clips decoded when they are asked for, instead of packed shards: for a first look, or where the disk is small."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avppc.clip import CLIP_FRAMES, NO_LABEL, SAMPLES_PER_FRAME, VIDEO_FPS, Clip, ClipBatch
from avppc.config.checks import check_integer
from avppc.data.clock import AudioTimeline, FrameGrid
from avppc.data.crop import Crop
from avppc.data.decode import (
    Backend,
    DecodeError,
    Source,
    check_container,
    damage_as_decode_error,
    decode_clip,
    open_video,
)
from avppc.data.manifest import Video
from avppc.data.prepare_worker import clip_id
from avppc.data.reader import choose_streams, decode_packet, missing_sound


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


@dataclass(frozen=True, eq=False)
class SoundAndFrames:
    """What a decoder of pictures alone needs beside the file."""

    audio: NDArray[np.int16]
    """[640 T] at 16 kHz; sample n belongs to the first frame's time + n / 16000 s."""
    frames: NDArray[np.int32]
    """[T] numbers of the frames of the video, in the order in which they are shown, nearest to each instant."""
    height: int
    """Pixels, as stored."""
    width: int
    """Pixels, as stored."""


def read_sound_and_frames(source: Source, start_frame: int, num_frames: int) -> SoundAndFrames:
    """Decodes the sound of a clip and picks its pictures by their time stamps, without decoding them.

    Raises:
        DecodeError: as decode_clip, as far as it can be known without decoding pictures; also for files whose edit list
            hides frames, which decoders count differently.
    """
    with damage_as_decode_error(source) as name, open_video(source) as container:
        check_container(source)
        video, audio = choose_streams(container)
        stamps: list[int] = []
        sounds: list[av.AudioFrame] = []
        for packet in container.demux(video, audio):
            if packet.stream is audio:
                sounds += [frame for frame in decode_packet(packet) if isinstance(frame, av.AudioFrame)]
            elif packet.size and packet.pts is not None:
                if packet.is_discard:
                    raise DecodeError(name, "hidden frames: an edit list hides some, decode it with PyAV")
                stamps.append(packet.pts)
        if not stamps or video.time_base is None:
            raise ValueError("the video stream has no pictures")
        stamps.sort()
        timeline = AudioTimeline(stamps[0] * Fraction(video.time_base), start_frame * SAMPLES_PER_FRAME)
        for sound in sounds:
            timeline.push(sound)
        timeline.finish()
        samples, missing = timeline.take(start_frame * SAMPLES_PER_FRAME, num_frames * SAMPLES_PER_FRAME)
        missing_sound(missing, len(samples))
        chosen = _nearest_frames(stamps, video.time_base, start_frame)
        if len(chosen) < num_frames:
            total = start_frame + len(chosen)
            needed = start_frame + num_frames
            raise DecodeError(name, f"too short: {total} frames of 1/25 s, {needed} are needed")
        if None in chosen[:num_frames]:
            seconds = (start_frame + chosen.index(None)) / VIDEO_FPS
            raise DecodeError(name, f"frames missing: the first at {seconds:.2f} s")
        numbers = np.array(chosen[:num_frames], np.int32)
        return SoundAndFrames(np.array(samples), numbers, video.codec_context.height, video.codec_context.width)


def _nearest_frames(stamps: list[int], time_base: Fraction, start_frame: int) -> list[int | None]:
    """Number of the frame of each instant from start_frame on, by the same grid that cuts clips."""
    grid = FrameGrid(time_base, stamps[0], start_frame)
    numbers = [np.array([[number & 255, number >> 8 & 255, number >> 16]], np.uint8) for number in range(len(stamps))]
    images = [image for stamp, number in zip(stamps, numbers, strict=True) for image in grid.push(stamp, number)]
    images += grid.finish()
    weights = np.array([1, 1 << 8, 1 << 16])
    return [None if image is None else int(image[0] @ weights) for image in images]


def as_batch(clips: Sequence[VideoClip], video: Tensor, audio: Tensor) -> ClipBatch:
    """A batch on the video's device."""
    numbers = torch.tensor([[clip.label, clip.clip_id, clip.speaker] for clip in clips]).to(video.device)
    return ClipBatch(video, audio.to(video.device), *(numbers[:, column].contiguous() for column in range(3)))
