"""Clip and ClipBatch: the one type that flows through the package, and the clock and splits every part agrees on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from avppc.checks import check_device, check_integer, check_tensor

VIDEO_FPS = 25
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // VIDEO_FPS  # 640: audio follows the video clock
CLIP_FRAMES = 29  # 1.16 s, as in LRW
CLIP_SAMPLES = CLIP_FRAMES * SAMPLES_PER_FRAME  # 18,560
CROP_SIZE = 96  # pixels, the square mouth crop that is stored
LUMA_BLACK, LUMA_WHITE = 16, 235  # of 255: pixels are stored in video's range, as decoders give them
LRW_ROWS, LRW_COLUMNS = (115, 211), (79, 175)  # pixels, the mouth in frames of LRW: first, and one after the last
NO_LABEL = -1
UNLABELED_FOLDER = "_UNLABELED"  # beside the folders of the words
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(SplitName)  # the order is part of synth's seeds: never change it


def _check(name: str, value: Tensor, dtype: torch.dtype, dims: int) -> None:
    check_tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {value.dtype}")
    if value.ndim != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")


def _check_clock(video: Tensor, audio: Tensor, time_dim: int) -> None:
    frames, samples = video.shape[time_dim], audio.shape[-1]
    if frames < 1 or 0 in video.shape[-2:]:
        raise ValueError(f"video must have at least 1 frame of 1 x 1 pixels, got shape {tuple(video.shape)}")
    if samples != frames * SAMPLES_PER_FRAME:
        raise ValueError(
            f"audio must have {SAMPLES_PER_FRAME} samples a video frame: {frames} frames need "
            f"{frames * SAMPLES_PER_FRAME} samples, got {samples}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """One talking mouth, seen and heard over the same span of time."""

    video: Tensor
    """[T, H, W] uint8 luma, 16 black to 235 white, 25 frames a second."""
    audio: Tensor
    """[S] int16 mono at 16 kHz; S = 640 T."""
    label: int = NO_LABEL
    """Index of the spoken word, or -1 where it is not known."""
    clip_id: int = 0
    """Number of the clip in its data set; equal ids mean the same clip."""
    speaker: int = -1
    """Number of the speaker, or -1 where it is not known."""

    def __post_init__(self) -> None:
        _check("video", self.video, torch.uint8, 3)
        _check("audio", self.audio, torch.int16, 1)
        _check_clock(self.video, self.audio, time_dim=0)
        if self.audio.device != self.video.device:
            raise ValueError(f"audio must be on {self.video.device} like video, got {self.audio.device}")
        for name in ("label", "clip_id", "speaker"):
            check_integer(name, getattr(self, name), -(1 << 63), (1 << 63) - 1)
        for name in ("label", "speaker"):
            if getattr(self, name) < -1:
                raise ValueError(f"{name} must be at least 0, or -1 where it is not known; got {getattr(self, name)}")

    def __repr__(self) -> str:
        return (
            f"Clip(video={list(self.video.shape)}, audio={list(self.audio.shape)}, "
            f"label={self.label}, clip_id={self.clip_id}, speaker={self.speaker})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class ClipBatch:
    """N clips of equal length on one device."""

    video: Tensor
    """[N, T, H, W] uint8 luma, 16 black to 235 white, 25 frames a second."""
    audio: Tensor
    """[N, S] int16 mono at 16 kHz; S = 640 T."""
    labels: Tensor
    """[N] int64 word indices, -1 where not known."""
    clip_ids: Tensor
    """[N] int64 numbers of the clips in their data set."""
    speakers: Tensor
    """[N] int64 numbers of the speakers, -1 where not known."""

    def __post_init__(self) -> None:
        _check("video", self.video, torch.uint8, 4)
        _check("audio", self.audio, torch.int16, 2)
        _check_clock(self.video, self.audio, time_dim=1)
        count = len(self.video)
        if count < 1:
            raise ValueError(f"video must hold at least one clip, got shape {tuple(self.video.shape)}")
        for name in ("audio", "labels", "clip_ids", "speakers"):
            value = getattr(self, name)
            if name != "audio":
                _check(name, value, torch.int64, 1)
            if len(value) != count:
                raise ValueError(f"{name} must have {count} rows like video, got {len(value)}")
            if value.device != self.video.device:
                raise ValueError(f"{name} must be on {self.video.device} like video, got {value.device}")

    @classmethod
    def stack(cls, clips: Sequence[Clip]) -> ClipBatch:
        """Stacks clips of equal shape into one batch."""
        if not isinstance(clips, Sequence) or not all(isinstance(clip, Clip) for clip in clips):
            raise TypeError(f"clips must be a sequence of Clip, got {type(clips).__name__}")
        if not clips:
            raise ValueError("clips must hold at least one clip, got 0")
        kinds = {(clip.video.shape, clip.video.device) for clip in clips}
        if len(kinds) > 1:
            listed = "; ".join(sorted(f"{list(shape)} on {device}" for shape, device in kinds))
            raise ValueError(f"clips must have videos of one shape on one device, got {listed}")
        return cls(
            video=torch.stack([clip.video for clip in clips]),
            audio=torch.stack([clip.audio for clip in clips]),
            labels=torch.tensor([clip.label for clip in clips]),
            clip_ids=torch.tensor([clip.clip_id for clip in clips]),
            speakers=torch.tensor([clip.speaker for clip in clips]),
        )

    def __len__(self) -> int:
        return len(self.video)

    @property
    def device(self) -> torch.device:
        """Device of all its tensors."""
        return self.video.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ClipBatch:
        """The same batch on another device; with non_blocking the copy of pinned memory is asynchronous."""
        place = check_device("device", device)
        return self._map(lambda value: value.to(place, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        """The same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._map(Tensor.pin_memory)

    def __getitem__(self, rows: slice | Tensor) -> ClipBatch:
        """The chosen rows as a batch of their own: a slice, or [n] int64 numbers, or [N] bool."""
        if not isinstance(rows, slice):
            check_tensor("rows", rows)
            if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.bool):
                raise TypeError(f"rows must be a slice, [n] int64 or [N] bool; got {rows.dtype} {list(rows.shape)}")
            if rows.device.type not in ("cpu", self.device.type):
                raise ValueError(f"rows must be on the CPU or on {self.device}, got {rows.device}")
        try:
            return self._map(lambda value: value[rows])
        except (IndexError, TypeError, ValueError) as error:  # out of range, a slice of texts, none at all
            raise ValueError(f"rows must be rows of these {len(self)} clips: {error}") from error

    def _map(self, function: Callable[[Tensor], Tensor]) -> ClipBatch:
        names = ("video", "audio", "labels", "clip_ids", "speakers")
        return ClipBatch(**{name: function(getattr(self, name)) for name in names})

    def __repr__(self) -> str:
        return f"ClipBatch(video={list(self.video.shape)}, audio={list(self.audio.shape)}, device={self.device})"
