"""Pretraining by audio-visual permutative predictive coding: from clips to the loss of the sub-tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from avppc.clip import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, ClipBatch
from avppc.config.pretrain import PretrainConfig
from avppc.data.augment import augment_log_mel, augment_video, crop_video
from avppc.data.elements import Elements, cut_elements
from avppc.models.audio import MEL_FRAMES_PER_VIDEO_FRAME, AudioEncoder
from avppc.models.temporal import ElementPool
from avppc.models.video import VideoEncoder
from avppc.ops.log_mel import log_mel
from avppc.tasks.permutative import SUBTASKS, PermutativeInfoNCE, SubTask
from avppc.tasks.protocol import ProxyTask, TaskOutput


class PermutativeTask(ProxyTask):
    """All 42 sub-tasks over the past and future of each clip, seen and heard.

    Past and future go through each encoder as one batch of 2 N elements. They are cut first: no feature, motion channel
    or convolution reaches over the cut.
    """

    def __init__(self, config: PretrainConfig, subtasks: tuple[SubTask, ...] = SUBTASKS) -> None:
        super().__init__()
        check_mel_clock(config)
        self.config = config
        dim, features = config.objective.dim, config.encoder.features
        self.video_encoder = VideoEncoder(config.encoder)
        self.audio_encoder = AudioEncoder(config.features.bands, features, config.audio_width)
        self.video_pool = ElementPool(features, dim)
        self.audio_pool = ElementPool(features, dim)
        weights = [
            config.objective.between_weight if subtask.between_modalities else config.objective.other_weight
            for subtask in subtasks
        ]
        self.loss = PermutativeInfoNCE(
            dim,
            subtasks=subtasks,
            task_weights=weights,
            fusion=config.objective.fusion,
            normalize=config.objective.normalize,
            learn_scale=config.objective.learn_scale,
            return_stats=True,
        )

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """The loss of a batch; in eval mode the centre crop, the middle of the jitter and no variation."""
        video, audio = self.embed(batch, generator)
        count = len(batch)
        loss, stats = self.loss(video[:count], video[count:], audio[:count], audio[count:])
        metrics = {"task_loss": stats.task_loss, "task_accuracy": stats.accuracy}
        return TaskOutput(loss, metrics)

    def embed(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings [2 N, D] of what is seen and of what is heard: N rows of the past, then N of the future."""
        augment = self.config.augment
        elements = cut_elements(
            batch,
            self.config.cut,
            jitter_frames=augment.time_jitter_frames,
            generator=generator if self.training else None,
        )
        stride = self.config.frame_stride
        phase = int(torch.randint(0, stride, (), generator=generator)) if self.training else 0
        frames = self.video_encoder(self._pictures(elements, generator), frame_stride=stride, frame_phase=phase)
        sounds = self.audio_encoder(self._sounds(elements, generator))
        return self.video_pool(frames).float(), self.audio_pool(sounds).float()

    def _pictures(self, elements: Elements, generator: torch.Generator) -> Tensor:
        encoder = self.config.encoder
        if not self.training:
            return crop_video(elements.video, encoder.crop_pixels, encoder.input_pixels)
        return augment_video(elements.video, encoder.crop_pixels, encoder.input_pixels, self.config.augment, generator)

    def _sounds(self, elements: Elements, generator: torch.Generator) -> Tensor:
        frames = elements.video.shape[1] * MEL_FRAMES_PER_VIDEO_FRAME
        features = log_mel(elements.audio, self.config.features)[:, :frames]
        return augment_log_mel(features, self.config.augment, generator) if self.training else features

    def describe(self) -> dict[str, list[str]]:
        names = [subtask.name for subtask in self.loss.subtasks]
        return {"task_loss": names, "task_accuracy": names}

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Mean accuracy of each group of sub-tasks."""
        groups: dict[str, list[float]] = {}
        for subtask, accuracy in zip(self.loss.subtasks, row["task_accuracy"], strict=True):
            groups.setdefault(subtask.group, []).append(accuracy)
        return {group: sum(values) / len(values) for group, values in groups.items()}


def check_mel_clock(config: PretrainConfig) -> None:
    """Raises ValueError unless the features have 4 frames a video frame."""
    features = config.features
    needed = SAMPLES_PER_FRAME // MEL_FRAMES_PER_VIDEO_FRAME
    if features.sample_rate_hz != SAMPLE_RATE_HZ or features.hop_samples != needed:
        raise ValueError(
            f"features must have {MEL_FRAMES_PER_VIDEO_FRAME} frames a video frame: sample_rate_hz={SAMPLE_RATE_HZ} "
            f"and hop_samples={needed}, got {features.sample_rate_hz} and {features.hop_samples}"
        )
