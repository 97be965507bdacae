"""Pretraining by permutative predictive coding: from clips to the loss of the sub-tasks."""

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
from avppc.losses.permutative_info_nce import PermutativeInfoNCE
from avppc.losses.subtasks import (
    ELEMENTS,
    SUBTASKS,
    SubTask,
    choose_subtasks,
    fixed_weights,
    is_by_moment,
    make_weighting,
)
from avppc.ops.info_nce.moments import moment_info_nce
from avppc.ops.info_nce.op import InfoNCEStats
from avppc.tasks.base import ProxyTask, Representations, TaskOutput
from avppc.tasks.config import TaskConfig
from avppc.tasks.cuts import cut_audio, cut_video, draw_starts

CHUNKS = ("V1", "V2", "V3", "V4")
VISUAL_SUBTASKS = tuple(task for task in SUBTASKS if task.name in ("Vp->Vf", "Vf->Vp"))


def make_av_permutative(config: TaskConfig) -> ProxyTask:
    """All 42 sub-tasks, or those that config.subtasks chooses."""
    return PermutativeTask(config, choose_subtasks(SUBTASKS, config.subtasks, config.exclude))


def make_visual_permutative(config: TaskConfig) -> ProxyTask:
    """The sub-tasks of pictures alone: two over past and future, by moments or spans, or 42 over four chunks."""
    if config.objective.chunks == 4:
        return ChunkTask(config)
    subtasks = choose_subtasks(VISUAL_SUBTASKS, config.subtasks, config.exclude)
    return (
        PermutativeTask(config, subtasks) if config.objective.moments == "none" else VisualMomentTask(config, subtasks)
    )


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
            candidates=objective.candidates,
            reduction="mean" if weights else "task",
            return_stats=True,
        )
        self.weighting = make_weighting(objective, subtasks)

    def score(self, representations: Representations, batch: ClipBatch) -> TaskOutput:
        """The loss from the four elements, None where no sub-task uses it, and what else `represent` gives."""
        elements, clips = _by_argument(representations)
        loss, stats = self.loss(*elements, self._ids(batch), **clips)
        metrics = {"task_loss": stats.task_loss, "task_accuracy": stats.accuracy}
        if self.weighting is not None:
            loss = self.weighting(loss, [value for value in representations if value is not None])
            metrics["task_weight"] = self.weighting.weights()
        return TaskOutput(loss, metrics)

    def logits(self, representations: Representations, *, swapped: bool = False) -> Tensor:
        """[K, N, N] scores, or [K, N, 2 N] with the swapped targets after the true ones, as the loss gives them."""
        elements, clips = _by_argument(representations)
        return self.loss.logits(*elements, **clips, swapped=swapped)

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


def _by_argument(representations: Representations) -> tuple[Representations, dict[str, Tensor | None]]:
    """The four elements, and by name the moments of whole clips where there are some."""
    return representations[:4], dict(zip(("v_clip", "a_clip"), representations[4:], strict=False))


class PermutativeTask(PermutativeBase):
    """Sub-tasks over the past and future of each clip, of its pictures and (if a sub-task needs it) of its sound.

    Past and future go through each encoder as one batch of 2 N elements. They are cut before that: no feature, motion
    channel or convolution reaches across the cut. An element is the last state of a recurrent network over its frames
    or, with objective.moments "element", the sequence of its moments. With "clip" the encoders also see whole clips,
    for the sub-tasks of all that is seen and all that is heard.
    """

    def __init__(self, config: TaskConfig, subtasks: Sequence[SubTask] = SUBTASKS) -> None:
        if not _uses(subtasks, "V"):
            names = [task.name for task in subtasks]
            raise ValueError(f"subtasks must use pictures (V), or no visual encoder is learned; got {names}")
        super().__init__(config, subtasks, with_audio=_uses(subtasks, "A"))
        features, dim = config.encoder.features, config.objective.dim
        by_moment = any(is_by_moment(config.objective, subtask) for subtask in subtasks)
        self.scored = config.objective.moments if by_moment else "none"
        """What is scored moment by moment: "none", "element" or "clip"."""
        if self.scored == "clip":
            self.video_moment, self.audio_moment = nn.Linear(features, dim), nn.Linear(features, dim)
        elif self.scored == "element":
            self.video_pool, self.audio_pool = nn.Linear(features, dim), nn.Linear(features, dim)
            if self.count_moments(self.span_frames) < 1:
                raise ValueError(
                    f"cut.past_frames must leave spans a moment, {2 * self.margin_frames + config.frame_stride} frames "
                    f"after time jitter; got {self.span_frames}"
                )

    @property
    def frames_needed(self) -> int:
        least = super().frames_needed
        if self.scored != "clip":
            return least
        jitter = self.config.augment.time_jitter_frames
        return max(least, jitter + 2 * (self.margin_frames + self.config.frame_stride))  # two moments

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """The loss of a batch; in eval mode the centre crop, the middle of the jitter and no variation."""
        return self.score(self.represent(batch, generator), batch)

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """Vp, Vf, Ap, Af, each [N, D], or [N, T, D] by moment; None for sound that no sub-task uses.

        With objective.moments "clip" followed by the moments [N, T, D] of the whole clips, seen and heard.
        """
        video, audio = self.embed(batch, generator)
        count = len(batch)
        audio_parts: list[Tensor | None] = [None, None] if audio is None else [audio[:count], audio[count:]]
        clips = self.embed_clips(batch, generator) if self.scored == "clip" else ()
        return [video[:count], video[count:], *audio_parts, *clips]

    def embed(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Embeddings of pictures and sound (None if unused): 2 N rows, those of the past, then those of the future."""
        elements = self.cut(batch, generator)
        phase = self.draw_phase(generator)
        if self.scored == "element":
            seen = self._video_moments(elements.video, phase, generator)
            heard = self._audio_moments(elements.audio, phase, generator)
            return self.video_pool(seen).float(), self.audio_pool(heard).float()
        video = self.video_pool(self.frame_features(elements.video, phase, generator)).float()
        if not self.with_audio:
            return video, None
        return video, self.audio_pool(self.audio_features(elements.audio, generator)).float()

    def embed_clips(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The moments [N, T, D] of the whole clips, less a time jitter of their own, as seen and as heard."""
        jitter = self.config.augment.time_jitter_frames
        frames = batch.video.shape[1] - jitter
        starts = draw_starts(len(batch), jitter, generator, training=self.training)
        phase = self.draw_phase(generator)
        seen = self._video_moments(cut_video(batch.video, starts, frames), phase, generator)
        heard = self._audio_moments(cut_audio(batch.audio, starts, frames), phase, generator)
        return self.video_moment(seen).float(), self.audio_moment(heard).float()

    def embed_video(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """Embeddings [N, D] of the pictures of N spans, [N, T, H, W] uint8; or [N, T', D] of their moments."""
        if self.scored == "none":
            return super().embed_video(video, generator)
        head = self.video_pool if self.scored == "element" else self.video_moment
        return head(self._video_moments(video, self.draw_phase(generator), generator)).float()

    def embed_audio(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        """The same of the sound of N spans, [N, 640 T] int16."""
        if self.scored == "none":
            return super().embed_audio(audio, generator)
        head = self.audio_pool if self.scored == "element" else self.audio_moment
        return head(self._audio_moments(audio, self.draw_phase(generator), generator)).float()

    def _video_moments(self, video: Tensor, phase: int, generator: torch.Generator) -> Tensor:
        """Features [N, T', F] of the moments of spans [N, T, H, W]."""
        return self.frame_features(video, phase, generator)[:, self.moments(video.shape[1], phase)]

    def _audio_moments(self, audio: Tensor, phase: int, generator: torch.Generator) -> Tensor:
        """Features [N, T', F] of the moments of spans [N, 640 T] of sound."""
        features = self.audio_features(audio, generator)
        moments = self.moments(features.shape[1], phase)
        return features[:, phase :: self.config.frame_stride][:, moments]

    @property
    def has_pair_scores(self) -> bool:
        """Spans too short for a moment have none where moments are scored."""
        return bool(self._pairing()) and (self.scored == "none" or self.count_moments(self.span_frames) > 0)

    def _pairing(self) -> list[int]:
        """Numbers of the sub-tasks that score which sound belongs to which picture of the same time."""
        objective, subtasks = self.config.objective, self.loss.subtasks
        if self.scored == "none":
            return [number for number, subtask in enumerate(subtasks) if subtask.same_time]
        return [number for number, subtask in enumerate(subtasks) if is_by_moment(objective, subtask)]

    def pair_scores(self, video: Tensor, audio: Tensor) -> Tensor:
        """The mean score of the sub-tasks between pictures and sound of the same time, and of moments.

        Args:
            video: [N, D] or [N, T, D], of `embed_video`.
            audio: [M, D] or [M, T, D], of `embed_audio`.
        """
        scores = []
        moments = video.shape[1] if video.ndim == 3 else 1
        seen, heard = self._normalized(video), self._normalized(audio)
        for number in self._pairing():
            forward = self.loss.subtasks[number].inputs[0][0] == "V"
            weight = self.loss.score.weight[number]
            queries = seen @ (weight.T if forward else weight)
            scores.append(queries.flatten(1) @ heard.flatten(1).T / moments)
        return torch.stack(scores).mean(0)

    def _normalized(self, embeddings: Tensor) -> Tensor:
        """The embeddings, normalised as the loss normalises them."""
        if self.config.objective.normalize == "none":
            return embeddings
        return functional.layer_norm(embeddings, embeddings.shape[-1:])


def _uses(subtasks: Sequence[SubTask], modality: str) -> bool:
    return any(element[0] == modality for task in subtasks for element in (*task.inputs, *task.targets))


class VisualMomentTask(ProxyTask):
    """Pictures alone, at every cut of the clip: from what was seen up to a moment, which moments come next?

    For "Vp->Vf" a recurrent network reads the clip forward. Its state at each moment predicts the next moments that
    share no frame with it, each with a W of its own, among all moments of the clip; "Vf->Vp" is the same backward.
    Other clips are no candidates: face, light and pose would tell them. The encoder's mean frame is the whole clip's.

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
