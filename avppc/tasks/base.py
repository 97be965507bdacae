"""The base class of the proxy tasks: the encoders that a task trains, what it cuts clips into, and what others call.

Clips are cut before anything with a reach in time (features, motion, convolutions), or the past would know the future.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from avppc.checks import check_integer
from avppc.clip import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, ClipBatch
from avppc.data.augment import augment_log_mel, augment_video, crop_video
from avppc.draws import integers
from avppc.models.encoders import MEL_FRAMES_PER_VIDEO_FRAME, AudioEncoder, VideoEncoder
from avppc.ops.clips import cut_spans
from avppc.ops.log_mel.op import log_mel
from avppc.tasks.config import CutConfig, TaskConfig


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


@dataclass(frozen=True, eq=False)
class TaskOutput:
    """The result of one batch."""

    loss: Tensor
    """0-d, with gradient."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached metrics to log, each 0-d or [K]; they stay on the device until they are logged."""


Representations = Sequence[Tensor | None]
"""Tensors [N, ...], one row for each clip; None for what the task does not use."""


class ProxyTask(nn.Module, ABC):
    """A task that needs no labels: its loss trains a visual encoder, which is kept, and what else it needs beside it.

    A task is a subclass with `forward`. The rest of what it may define is optional: `represent` and `score`, which
    make large batches possible; `pair_scores`, by which a trained task is diagnosed; and the names of its metrics.

    In eval mode nothing is random: the centre crop, and every frame_stride-th frame from the first.

    Args:
        with_audio: whether the task needs sound, and so an audio encoder.
    """

    video_pool: nn.Module
    audio_pool: nn.Module
    offset_frames: int = 1
    """Video frames between two neighbouring offsets of `offset_scores`."""

    def __init__(self, config: TaskConfig, *, with_audio: bool = True) -> None:
        super().__init__()
        self.config = config
        self.with_audio = with_audio
        dim, features = config.objective.dim, config.encoder.features
        self.video_encoder = VideoEncoder(config.encoder)
        if with_audio:
            check_mel_clock(config)
            self.audio_encoder = AudioEncoder(config.features.bands, features, config.audio_width)
        self.video_pool = ElementPool(features, dim)
        if with_audio:
            self.audio_pool = ElementPool(features, dim)

    @abstractmethod
    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """The loss of a batch of whole clips.

        Args:
            generator: the source of every random draw; what belongs to one clip is drawn by avppc.draws.
        """

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """What the encoders make of each clip by itself, each [N, ...]; `score` needs nothing else of the clips.

        A task that has both this and `score` can take the loss of more clips than pass through its encoders at once.
        """
        raise NotImplementedError

    def score(self, representations: Representations, batch: ClipBatch) -> TaskOutput:
        """The loss of a batch from its representations: what `forward` gives."""
        raise NotImplementedError

    @property
    def has_representations(self) -> bool:
        """Whether the task has `represent` and `score`."""
        return type(self).represent is not ProxyTask.represent

    def describe(self) -> dict[str, list[str]]:
        """The names of the entries of each [K] metric, by metric; the report and the log use them."""
        return {}

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """A few shares from 0 to 1 out of a row of logged metrics, for the progress bar."""
        return {}

    @property
    def frames_needed(self) -> int:
        """Frames of the shortest clips that the task can learn from."""
        return self.config.cut.frames

    @property
    def span_frames(self) -> int:
        """Frames of a span (the past or the future of a clip) after time jitter has shortened it."""
        return self.config.cut.past_frames - self.config.augment.time_jitter_frames

    @property
    def shortest_span(self) -> int:
        """Frames that a span needs: its jitter, and then two, for motion, or frame_stride, so that one is encoded."""
        return self.config.augment.time_jitter_frames + max(2, self.config.frame_stride)

    @property
    def margin_frames(self) -> int:
        """Frames at each end of a span whose features depend on what pads the span.

        Picture and sound are padded at the same places, so that padding would tell which moment belongs to which.
        """
        reaches = [self.video_encoder.reach]
        if self.with_audio:
            features = self.config.features
            window = features.window_samples / (2 if features.framing == "center" else 1)
            shift = self.config.augment.mel_shift_frames  # what is shifted out at one end comes in at the other
            mel_frames = AudioEncoder.REACH + math.ceil(window / features.hop_samples) + shift
            reaches.append(math.ceil(mel_frames / MEL_FRAMES_PER_VIDEO_FRAME))
        return max(reaches)

    def count_moments(self, frames: int) -> int:
        """How many moments a span of so many frames has: encoded frames that see nothing of what pads it."""
        return max(0, frames - 2 * self.margin_frames) // self.config.frame_stride

    def moments(self, frames: int, phase: int) -> slice:
        """Which of the encoded frames of a span, frame `phase` first, are its moments."""
        first = max(0, math.ceil((self.margin_frames - phase) / self.config.frame_stride))
        return slice(first, first + self.count_moments(frames))

    def cut(self, batch: ClipBatch, generator: torch.Generator) -> Elements:
        """Past and future of the clips, pictures and sound; in training each starts at random within its jitter."""
        augment = self.config.augment
        draws = generator if self.training else None
        return cut_elements(batch, self.config.cut, jitter_frames=augment.time_jitter_frames, generator=draws)

    def draw_phase(self, generator: torch.Generator) -> int:
        """The first frame that is encoded: random in training, below frame_stride; 0 in evaluation."""
        return int(torch.randint(0, self.config.frame_stride, (), generator=generator)) if self.training else 0

    def frame_features(self, video: Tensor, phase: int, generator: torch.Generator) -> Tensor:
        """Features [N, T', F] of every frame_stride-th frame of spans [N, T, H, W] uint8, from frame `phase` on."""
        encoder = self.config.encoder
        if self.training:
            augment = self.config.augment
            luma = augment_video(video, encoder.crop_pixels, encoder.input_pixels, augment, generator)
        else:
            luma = crop_video(video, encoder.crop_pixels, encoder.input_pixels)
        return self.video_encoder(luma, frame_stride=self.config.frame_stride, frame_phase=phase)

    def audio_features(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        """Features [N, T, F], one for each video frame, of spans of sound [N, 640 T] int16."""
        frames = audio.shape[1] // SAMPLES_PER_FRAME * MEL_FRAMES_PER_VIDEO_FRAME
        features = log_mel(audio, self.config.features)[:, :frames]
        if self.training:
            features = augment_log_mel(features, self.config.augment, generator)
        return self.audio_encoder(features)

    def embed_video(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """Embeddings [N, D] of the pictures of N spans, [N, T, H, W] uint8."""
        return self.video_pool(self.frame_features(video, self.draw_phase(generator), generator)).float()

    def embed_audio(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        """Embeddings [N, D] of the sound of N spans, [N, 640 T] int16."""
        return self.audio_pool(self.audio_features(audio, generator)).float()

    def pair_scores(self, video: Tensor, audio: Tensor) -> Tensor:
        """[N, M]: for each pair of pictures and sound, how surely the task takes them for the same moment of a clip.

        Higher is surer; only scores of the same call compare. Tasks that do not learn which sound belongs to which
        picture, such as the time arrow, have none.

        Args:
            video: [N, D], of `embed_video`.
            audio: [M, D], of `embed_audio`.
        """
        raise NotImplementedError

    @property
    def has_pair_scores(self) -> bool:
        """Whether the task has `pair_scores`; `avppc diagnose` and `check-sync` measure with them."""
        return type(self).pair_scores is not ProxyTask.pair_scores

    def offset_scores(self, batch: ClipBatch, generator: torch.Generator) -> Tensor | None:
        """[N, offsets]: for each clip, how well its sound at each offset fits its pictures; offset 0 is in the middle.

        The pictures are a span in the middle of the clip, the sounds are those before it, at its time and after it.
        None where the task has no pair scores.
        """
        if not self.has_pair_scores:
            return None
        return torch.stack([pairs.diagonal() for pairs in self.offset_pair_scores(batch, generator)], 1)

    def offset_pair_scores(self, batch: ClipBatch, generator: torch.Generator) -> Iterator[Tensor]:
        """[N, N] for each offset in turn: `pair_scores` of the pictures of each clip with the sound of each clip.

        Only for tasks with pair scores.
        """
        frames = self.span_frames
        most = (batch.video.shape[1] - frames) // 2
        starts = torch.full((len(batch),), most)
        video = self.embed_video(cut_video(batch.video, starts, frames), generator)
        for offset in range(-most, most + 1):
            yield self.pair_scores(video, self.embed_audio(cut_audio(batch.audio, starts + offset, frames), generator))


def check_mel_clock(config: TaskConfig) -> None:
    """Raises ValueError unless the features have 4 frames a video frame."""
    features = config.features
    needed = SAMPLES_PER_FRAME // MEL_FRAMES_PER_VIDEO_FRAME
    if features.sample_rate_hz != SAMPLE_RATE_HZ or features.hop_samples != needed:
        raise ValueError(
            f"features must have {MEL_FRAMES_PER_VIDEO_FRAME} frames a video frame: sample_rate_hz={SAMPLE_RATE_HZ} "
            f"and hop_samples={needed}, got {features.sample_rate_hz} and {features.hop_samples}"
        )


class ElementPool(nn.Module):
    """Embedding of a span: the last state of a GRU over its frames, mapped to `dim`: [N, T, features] -> [N, dim]."""

    def __init__(self, features: int, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, batch_first=True)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.project(states[:, -1])
