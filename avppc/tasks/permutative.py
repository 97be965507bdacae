"""Pretraining by permutative predictive coding: from clips to the loss of the sub-tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.clip import ClipBatch
from avppc.losses.permutative_info_nce import PermutativeInfoNCE
from avppc.losses.subtasks import SUBTASKS, SubTask, choose_subtasks, fixed_weights, is_by_moment, make_weighting
from avppc.tasks.base import ProxyTask, Representations, TaskOutput, cut_audio, cut_video, draw_starts
from avppc.tasks.config import TaskConfig


def make_av_permutative(config: TaskConfig) -> ProxyTask:
    """All 42 sub-tasks, or those that config.subtasks chooses."""
    return PermutativeTask(config, choose_subtasks(SUBTASKS, config.subtasks, config.exclude))


class PermutativeBase(ProxyTask):
    """What the permutative tasks share: the losses of the sub-tasks over four elements, and their weighted mean."""

    def __init__(
        self, config: TaskConfig, subtasks: Sequence[SubTask], *, with_audio: bool, moment_offsets: Sequence[int] = ()
    ) -> None:
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
            moment_offsets=moment_offsets,
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
        offsets = config.objective.moment_offsets if config.objective.moments == "clip" else ()
        super().__init__(config, subtasks, with_audio=_uses(subtasks, "A"), moment_offsets=offsets)
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
        moments = 2 + max(self.loss.moment_offsets, default=0)
        return max(least, jitter + 2 * self.margin_frames + moments * self.config.frame_stride)

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """The loss of a batch; in eval mode the centre crop, the middle of the jitter and no variation."""
        return self.score(self.represent(batch, generator), batch)

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """Vp, Vf, Ap, Af, each [N, D], or [N, T, D] by moment; None for sound that no sub-task uses.

        With objective.moments "clip" followed by the moments [N, T, D] of the whole clips, seen and heard.
        """
        if self.takes_one_pass:
            return self._represent_in_one_pass(batch, generator)
        video, audio = self.embed(batch, generator)
        count = len(batch)
        audio_parts: list[Tensor | None] = [None, None] if audio is None else [audio[:count], audio[count:]]
        clips = self.embed_clips(batch, generator) if self.scored == "clip" else ()
        return [video[:count], video[count:], *audio_parts, *clips]

    @property
    def takes_one_pass(self) -> bool:
        """Whether `represent` encodes the pictures of a clip once: past and future are those of its features that see
        frames of theirs alone. Nothing else may join the clip's frames, as a time mask does with their mean."""
        config = self.config
        enough = self.span_frames >= self.video_encoder.reach + config.frame_stride
        local = self.video_encoder.is_local and not config.augment.time_mask_frames
        return self.scored == "clip" and local and enough

    def _represent_in_one_pass(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        span, jitter = self.span_frames, self.config.augment.time_jitter_frames
        frames = batch.video.shape[1] - jitter
        starts = draw_starts(len(batch), jitter, generator, training=self.training)
        phase = self.draw_phase(generator)
        features = self.frame_features(cut_video(batch.video, starts, frames), phase, generator)
        firsts = (0, self.config.cut.future_start)
        seen = [self.video_pool(features[:, self._inside(first, span, frames, phase)]).float() for first in firsts]
        sounds = torch.cat([cut_audio(batch.audio, starts + first, span) for first in firsts])
        heard = self.audio_pool(self.audio_features(sounds, generator)).float().chunk(2)
        video = self.video_moment(features[:, self.moments(frames, phase)]).float()
        audio = self.audio_moment(self._audio_moments(cut_audio(batch.audio, starts, frames), phase, generator)).float()
        return [*seen, *heard, video, audio]

    def _inside(self, first: int, span: int, frames: int, phase: int) -> slice:
        """Which encoded frames of a clip, frame `phase` first, see none but the `span` ones from `first` on."""
        stride, reach = self.config.frame_stride, self.video_encoder.reach
        start = first + reach if first else 0
        end = first + span - (reach if first + span < frames else 0)
        return slice(max(0, math.ceil((start - phase) / stride)), math.ceil((end - phase) / stride))

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
        return [
            number
            for number, subtask in enumerate(subtasks)
            if is_by_moment(objective, subtask) and not subtask.crosses_both
        ]

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
