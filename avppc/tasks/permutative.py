"""Pretraining by permutative predictive coding: from clips to the loss of the sub-tasks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from avppc.clip import ClipBatch
from avppc.losses.permutative_info_nce import ELEMENTS, SUBTASKS, PermutativeInfoNCE, SubTask
from avppc.losses.subtasks import choose_subtasks, fixed_weights, make_weighting
from avppc.tasks.base import ProxyTask, Representations, TaskOutput
from avppc.tasks.config import TaskConfig
from avppc.tasks.cuts import cut_video, draw_starts

CHUNKS = ("V1", "V2", "V3", "V4")
SAME_TIME = ("Vp->Ap", "Vf->Af", "Ap->Vp", "Af->Vf")
VISUAL_SUBTASKS = tuple(task for task in SUBTASKS if task.name in ("Vp->Vf", "Vf->Vp"))


def make_av_permutative(config: TaskConfig) -> ProxyTask:
    """All 42 sub-tasks, or those that config.subtasks chooses."""
    return PermutativeTask(config, choose_subtasks(SUBTASKS, config.subtasks, config.exclude))


def make_visual_permutative(config: TaskConfig) -> ProxyTask:
    """The sub-tasks of pictures alone: two over past and future, or 42 over four chunks of the clip."""
    if config.objective.chunks == 4:
        return ChunkTask(config)
    return PermutativeTask(config, choose_subtasks(VISUAL_SUBTASKS, config.subtasks, config.exclude))


class PermutativeBase(ProxyTask):
    """What the permutative tasks share: the losses of the sub-tasks over four elements, and their weighted mean."""

    def __init__(self, config: TaskConfig, subtasks: Sequence[SubTask], *, with_audio: bool) -> None:
        super().__init__(config, with_audio=with_audio)
        objective = config.objective
        weights = fixed_weights(objective, subtasks)
        self.loss = PermutativeInfoNCE(
            objective.dim,
            subtasks=subtasks,
            task_weights=weights,
            fusion=objective.fusion,
            normalize=objective.normalize,
            learn_scale=objective.learn_scale,
            gather=config.gather,
            swapped_negatives=objective.negatives == "same-clip",
            reduction="mean" if weights else "task",
            return_stats=True,
        )
        self.weighting = make_weighting(objective, subtasks)

    def score(self, representations: Representations, batch: ClipBatch) -> TaskOutput:
        """The loss from the four elements, each [N, D] or None where no sub-task uses it."""
        loss, stats = self.loss(*representations, self._ids(batch))
        metrics = {"task_loss": stats.task_loss, "task_accuracy": stats.accuracy}
        if self.weighting is not None:
            loss = self.weighting(loss, [element for element in representations if element is not None])
            metrics["task_weight"] = self.weighting.weights()
        return TaskOutput(loss, metrics)

    def _ids(self, batch: ClipBatch) -> Tensor | None:
        """Ids [N]; clips with equal ids are not negatives of each other."""
        leave_out = self.config.objective.leave_out
        if leave_out == "word":
            # A clip without a label has an id of its own.
            return torch.where(batch.labels < 0, -1 - batch.clip_ids, batch.labels)
        return batch.clip_ids if leave_out == "clip" else None

    def subtask_names(self) -> list[str]:
        """The names of the sub-tasks, in the order of their metrics."""
        return [subtask.name for subtask in self.loss.subtasks]

    def describe(self) -> dict[str, list[str]]:
        metrics = ("task_loss", "task_accuracy", *(["task_weight"] if self.weighting is not None else []))
        return {metric: self.subtask_names() for metric in metrics}

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Mean accuracy of each group of sub-tasks."""
        groups: dict[str, list[float]] = {}
        for subtask, accuracy in zip(self.loss.subtasks, row["task_accuracy"], strict=True):
            groups.setdefault(subtask.group, []).append(accuracy)
        return {group: sum(values) / len(values) for group, values in groups.items()}


class PermutativeTask(PermutativeBase):
    """Sub-tasks over the past and future of each clip, of its pictures and (if a sub-task needs it) of its sound.

    Past and future go through each encoder as one batch of 2 N elements. They are cut before that: no feature, motion
    channel or convolution reaches across the cut.
    """

    def __init__(self, config: TaskConfig, subtasks: Sequence[SubTask] = SUBTASKS) -> None:
        if not _uses(subtasks, "V"):
            names = [task.name for task in subtasks]
            raise ValueError(f"subtasks must use pictures (V), or no visual encoder is learned; got {names}")
        super().__init__(config, subtasks, with_audio=_uses(subtasks, "A"))

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """The loss of a batch; in eval mode the centre crop, the middle of the jitter and no variation."""
        return self.score(self.represent(batch, generator), batch)

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """Embeddings [N, D] of Vp, Vf, Ap, Af; None for sound that no sub-task uses."""
        video, audio = self.embed(batch, generator)
        count = len(batch)
        audio_parts: list[Tensor | None] = [None, None] if audio is None else [audio[:count], audio[count:]]
        return [video[:count], video[count:], *audio_parts]

    def embed(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Embeddings [2 N, D] of pictures and sound (None if unused): N rows of the past, then N of the future."""
        elements = self.cut(batch, generator)
        video = self.embed_video(elements.video, generator)
        return video, self.embed_audio(elements.audio, generator) if self.with_audio else None

    @property
    def has_pair_scores(self) -> bool:
        return any(task.name in SAME_TIME for task in self.loss.subtasks)

    def pair_scores(self, video: Tensor, audio: Tensor) -> Tensor:
        """The mean score of the sub-tasks between pictures and sound of the same time, past or future."""
        scores = []
        for task, weight in zip(self.loss.subtasks, self.loss.score.weight, strict=True):
            if task.name not in SAME_TIME:
                continue
            if task.inputs[0][0] == "V":
                scores.append((self._normalized(video) @ weight.T) @ self._normalized(audio).T)
            else:
                scores.append(self._normalized(video) @ (weight @ self._normalized(audio).T))
        return torch.stack(scores).mean(0)

    def _normalized(self, embeddings: Tensor) -> Tensor:
        """The embeddings, normalised as the loss normalises them."""
        if self.config.objective.normalize == "none":
            return embeddings
        return functional.layer_norm(embeddings, embeddings.shape[-1:])


def _uses(subtasks: Sequence[SubTask], modality: str) -> bool:
    return any(element[0] == modality for task in subtasks for element in (*task.inputs, *task.targets))


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
