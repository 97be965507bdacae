"""Visual permutative predictive coding: pretraining from pictures alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.clip import ClipBatch
from avppc.losses.subtasks import ELEMENTS, SUBTASKS, SubTask, choose_subtasks
from avppc.ops.info_nce.moments import moment_info_nce
from avppc.ops.info_nce.op import InfoNCEStats
from avppc.tasks.base import ProxyTask, Representations, TaskOutput, cut_video, draw_starts
from avppc.tasks.config import TaskConfig
from avppc.tasks.permutative import PermutativeBase, PermutativeTask

CHUNKS = ("V1", "V2", "V3", "V4")
VISUAL_SUBTASKS = tuple(task for task in SUBTASKS if task.name in ("Vp->Vf", "Vf->Vp"))


def make_visual_permutative(config: TaskConfig) -> ProxyTask:
    """The sub-tasks of pictures alone: two over past and future, by moments or spans, or 42 over four chunks."""
    if config.objective.chunks == 4:
        return ChunkTask(config)
    subtasks = choose_subtasks(VISUAL_SUBTASKS, config.subtasks, config.exclude)
    return (
        PermutativeTask(config, subtasks) if config.objective.moments == "none" else VisualMomentTask(config, subtasks)
    )


class VisualMomentTask(ProxyTask):
    """Pictures alone, at every cut of the clip: from what was seen up to a moment, which moments come next?

    For "Vp->Vf" a recurrent network reads the clip forward. Its state at each moment predicts the next moments that
    share no frame with it, each with a W of its own, among all moments of the clip; "Vf->Vp" is the same backward.
    Other clips are no candidates: face, light and pose would tell them.

    Reference: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018.
    """

    HORIZONS = 3  # how many moments a state predicts

    def __init__(self, config: TaskConfig, subtasks: Sequence[SubTask] = VISUAL_SUBTASKS) -> None:
        super().__init__(config, with_audio=False)
        del self.video_pool  # moments are embedded, not spans
        self.subtasks = tuple(subtasks)
        features, dim = config.encoder.features, config.objective.dim
        self.states = nn.ModuleList(nn.GRU(features, dim, batch_first=True) for _ in subtasks)
        self.target = nn.Linear(features, dim)
        self.weight = nn.Parameter((torch.eye(dim) / math.sqrt(dim)).repeat(len(subtasks) * self.HORIZONS, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def first_horizon(self) -> int:
        """Encoded frames from a state to the nearest moment that shares no frame with it."""
        return 2 * self.video_encoder.reach // self.config.frame_stride + 1

    @property
    def frames_needed(self) -> int:
        moments = self.first_horizon + self.HORIZONS
        jitter = self.config.augment.time_jitter_frames
        return jitter + 2 * self.margin_frames + moments * self.config.frame_stride

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        return self.score(self.represent(batch, generator), batch)

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """Features [N, T, F] of the moments of each clip."""
        jitter = self.config.augment.time_jitter_frames
        frames = batch.video.shape[1] - jitter
        if batch.video.shape[1] < self.frames_needed:
            raise ValueError(f"batch must have clips of {self.frames_needed} frames, they have {batch.video.shape[1]}")
        starts = draw_starts(len(batch), jitter, generator, training=self.training)
        phase = self.draw_phase(generator)
        features = self.frame_features(cut_video(batch.video, starts, frames), phase, generator)
        return [features[:, self.moments(frames, phase)].float()]

    def score(self, representations: Representations, batch: ClipBatch) -> TaskOutput:
        features = representations[0]
        assert features is not None
        losses, stats = self.losses(features)
        return TaskOutput(losses.mean(), {"task_loss": stats.task_loss, "task_accuracy": stats.accuracy})

    def losses(self, features: Tensor) -> tuple[Tensor, InfoNCEStats]:
        """Losses [P], one for each sub-task, and their statistics, from features [N, T, F] of the moments of clips."""
        count = features.shape[1] - self.first_horizon - self.HORIZONS + 1
        contexts, targets = [], []
        for subtask, states in zip(self.subtasks, self.states, strict=True):
            ordered = features if subtask.inputs == ("Vp",) else features.flip(1)
            contexts.append(states(ordered)[0][:, :count])
            targets.append(self.target(ordered))
        shape = (self.weight.shape[1],)
        queries, moments = (functional.layer_norm(torch.stack(side), shape) for side in (contexts, targets))
        subtasks = range(len(self.subtasks))
        steps = range(self.first_horizon, self.first_horizon + self.HORIZONS)
        loss, stats = moment_info_nce(
            queries,
            moments,
            self.weight,
            [(subtask, subtask) for subtask in subtasks for _ in steps],
            shifts=[step for _ in subtasks for step in steps],
            scale=self.log_scale.exp(),
            reduction="task",
            return_stats=True,
        )
        loss, task_loss, accuracy = (value.unflatten(0, (-1, self.HORIZONS)).mean(1) for value in (loss, *stats))
        return loss, InfoNCEStats(task_loss, accuracy)

    def subtask_names(self) -> list[str]:
        """The names of the sub-tasks, in the order of their metrics."""
        return [subtask.name for subtask in self.subtasks]

    def describe(self) -> dict[str, list[str]]:
        return {metric: self.subtask_names() for metric in ("task_loss", "task_accuracy")}

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return {"right": sum(row["task_accuracy"]) / len(self.subtasks)}


class ChunkTask(PermutativeBase):
    """Four chunks of a clip's pictures: every set of one or two predicts every disjoint one, 42 sub-tasks in all.

    They are the sub-tasks of SUBTASKS with V1, V2, V3, V4 in the places of Vp, Vf, Ap, Af. The jitter of a chunk is at
    most a quarter of its length.
    """

    def __init__(self, config: TaskConfig) -> None:
        chosen, excluded = (_as_elements(text) for text in (config.subtasks, config.exclude))
        if config.objective.weighting == "modality":  # there is one modality
            config = replace(config, objective=replace(config.objective, weighting="equal"))
        super().__init__(config, choose_subtasks(SUBTASKS, chosen, excluded), with_audio=False)

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        return self.score(self.represent(batch, generator), batch)

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        return self.embed_video(self.cut_chunks(batch, generator), generator).chunk(len(CHUNKS))

    @property
    def frames_needed(self) -> int:
        rooms = itertools.count(2)
        return len(CHUNKS) * next(room for room in rooms if room - self._jitter(room) >= self.config.frame_stride)

    def _jitter(self, room: int) -> int:
        """Frames by which a chunk is shorter than its room."""
        return min(self.config.augment.time_jitter_frames, room // 4)

    def cut_chunks(self, batch: ClipBatch, generator: torch.Generator) -> Tensor:
        """[4 N, T, H, W] uint8: the first chunk of every clip, then the second..."""
        room = batch.video.shape[1] // len(CHUNKS)
        jitter = self._jitter(room)
        parts = []
        for number in range(len(CHUNKS)):
            starts = draw_starts(len(batch), jitter, generator, training=self.training)
            parts.append(cut_video(batch.video, number * room + starts, room - jitter))
        return torch.cat(parts)

    def subtask_names(self) -> list[str]:
        names = ";".join(super().subtask_names())
        for element, chunk in zip(ELEMENTS, CHUNKS, strict=True):
            names = names.replace(element, chunk)
        return names.split(";")


def _as_elements(text: str) -> str:
    """Names of sub-tasks over chunks, as those of SUBTASKS."""
    for element, chunk in zip(ELEMENTS, CHUNKS, strict=True):
        text = text.replace(chunk, element)
    return text
