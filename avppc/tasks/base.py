"""What pretraining asks of a proxy task, and what the tasks share.

Spans of a clip, seen and heard, become features and embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from avppc.clip import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, ClipBatch
from avppc.data.augment import augment_log_mel, augment_video, crop_video
from avppc.models.audio import MEL_FRAMES_PER_VIDEO_FRAME, AudioEncoder
from avppc.models.video import VideoEncoder
from avppc.ops.log_mel.op import log_mel
from avppc.tasks.config import TaskConfig
from avppc.tasks.cuts import Elements, cut_audio, cut_elements, cut_video


@dataclass(frozen=True, eq=False)
class TaskOutput:
    """The result of one batch."""

    loss: Tensor
    """0-d, with gradient."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached figures to log, each 0-d or [K]; they stay on the device until they are logged."""


Representations = Sequence[Tensor | None]
"""Tensors [N, ...], a row a clip; None for what the task does not use."""


class ProxyTask(nn.Module, ABC):
    """A task that needs no labels. It owns the visual encoder, which is kept, and whatever else it trains beside it."""

    video_encoder: VideoEncoder

    @abstractmethod
    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """The loss of a batch of whole clips.

        Args:
            generator: the source of every random draw; what belongs to one clip is drawn by avppc.draws.
        """

    @property
    def frames_needed(self) -> int:
        """Frames of the shortest clips that the task can learn from."""
        return 1

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """What the encoders make of each clip by itself, each [N, ...]; `score` needs nothing else of the clips.

        A task that has both this and `score` can learn from batches that do not pass through its encoders at once.
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


class ElementTask(ProxyTask):
    """A task over spans of clips: a visual encoder and, if the task hears, an audio encoder beside it.

    In eval mode nothing is varied: the centre crop, and every frame_stride-th frame from the first.

    Args:
        hears: whether the task needs sound.
    """

    video_pool: nn.Module
    audio_pool: nn.Module
    offset_frames: int = 1
    """Video frames between two neighbouring offsets of `offset_scores`."""

    def __init__(self, config: TaskConfig, *, hears: bool = True) -> None:
        super().__init__()
        self.config = config
        dim, features = config.objective.dim, config.encoder.features
        self.video_encoder = VideoEncoder(config.encoder)
        if hears:
            check_mel_clock(config)
            self.audio_encoder = AudioEncoder(config.features.bands, features, config.audio_width)
        self.video_pool = ElementPool(features, dim)
        if hears:
            self.audio_pool = ElementPool(features, dim)

    @property
    def span_frames(self) -> int:
        """Length of an element, after its jitter is taken off."""
        return self.config.cut.past_frames - self.config.augment.time_jitter_frames

    @property
    def shortest_span(self) -> int:
        """Frames that a span needs: its jitter, and then two, for motion, or frame_stride, so that one is encoded."""
        return self.config.augment.time_jitter_frames + max(2, self.config.frame_stride)

    @property
    def frames_needed(self) -> int:
        return self.config.cut.frames

    def cut(self, batch: ClipBatch, generator: torch.Generator) -> Elements:
        """Past and future of the clips, seen and heard; in training each starts at random within its jitter."""
        augment = self.config.augment
        draws = generator if self.training else None
        return cut_elements(batch, self.config.cut, jitter_frames=augment.time_jitter_frames, generator=draws)

    def draw_phase(self, generator: torch.Generator) -> int:
        """The first frame that is encoded."""
        return int(torch.randint(0, self.config.frame_stride, (), generator=generator)) if self.training else 0

    def frame_features(self, video: Tensor, phase: int, generator: torch.Generator) -> Tensor:
        """Features [N, T', F] of every frame_stride-th frame of spans [N, T, H, W] uint8."""
        encoder = self.config.encoder
        if self.training:
            augment = self.config.augment
            luma = augment_video(video, encoder.crop_pixels, encoder.input_pixels, augment, generator)
        else:
            luma = crop_video(video, encoder.crop_pixels, encoder.input_pixels)
        return self.video_encoder(luma, frame_stride=self.config.frame_stride, frame_phase=phase)

    def sound_features(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        """Features [N, T, F] of spans of sound [N, 640 T] int16, one a video frame."""
        frames = audio.shape[1] // SAMPLES_PER_FRAME * MEL_FRAMES_PER_VIDEO_FRAME
        features = log_mel(audio, self.config.features)[:, :frames]
        if self.training:
            features = augment_log_mel(features, self.config.augment, generator)
        return self.audio_encoder(features)

    def see(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """Embeddings [N, D] of spans of picture [N, T, H, W] uint8."""
        return self.video_pool(self.frame_features(video, self.draw_phase(generator), generator)).float()

    def hear(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        """Embeddings [N, D] of spans of sound [N, 640 T] int16."""
        return self.audio_pool(self.sound_features(audio, generator)).float()

    @property
    def matches(self) -> bool:
        """Whether the task can tell how well a picture fits a sound."""
        return False

    def match(self, seen: Tensor, heard: Tensor) -> Tensor:
        """How well each picture fits each sound, [N, M], from embeddings [N, D] and [M, D]; only where it `matches`."""
        raise NotImplementedError

    def offset_scores(self, batch: ClipBatch, generator: torch.Generator) -> Tensor | None:
        """How well the sound fits the picture at each offset, [N, offsets], with the right offset in the middle.

        A picture in the middle of the clip is matched with the sounds before it, at its time and after it; None where
        the task has no score.
        """
        if not self.matches:
            return None
        return torch.stack([pairs.diagonal() for pairs in self.offset_pairs(batch, generator)], 1)

    def offset_pairs(self, batch: ClipBatch, generator: torch.Generator) -> Iterator[Tensor]:
        """How well each sound fits each picture, [N pictures, N sounds], for one offset after the other.

        Only where the task `matches`.
        """
        frames = self.span_frames
        most = (batch.video.shape[1] - frames) // 2
        starts = torch.full((len(batch),), most)
        seen = self.see(cut_video(batch.video, starts, frames), generator)
        for offset in range(-most, most + 1):
            yield self.match(seen, self.hear(cut_audio(batch.audio, starts + offset, frames), generator))


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
    """Embedding of one element: the last state of a GRU over its frames, mapped to the embedding width.

    [N, T, features] -> [N, dim].
    """

    def __init__(self, features: int, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, batch_first=True)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.project(states[:, -1])
