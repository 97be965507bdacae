"""The baselines: does this sound belong to this picture, does time run forward, and is the sound on time?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.clip import ClipBatch
from avppc.draws import uniform
from avppc.tasks.base import ProxyTask, Representations, TaskOutput, cut_audio, cut_video, draw_shifted, draw_starts
from avppc.tasks.config import TaskConfig


class PairScore(nn.Module):
    """Does this picture belong to this sound: embeddings [..., D] and [..., D] -> logits [...]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dim, dim)
        self.answer = nn.Linear(dim, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        return self.answer(self.hidden(torch.cat([video, audio], -1)).relu()).squeeze(-1)

    def every_pair(self, video: Tensor, audio: Tensor) -> Tensor:  # [N, D], [M, D] -> [N, M]
        """Logits of each picture with each sound."""
        first, second = self.hidden.weight.chunk(2, 1)
        parts = (video @ first.T)[:, None] + (audio @ second.T + self.hidden.bias)[None]
        return self.answer(parts.relu()).squeeze(-1)


def binary_output(logits: Tensor, truth: Tensor) -> TaskOutput:  # [N], [N] 0 or 1
    """Cross-entropy, with the share of right answers as a metric; a logit of exactly 0 counts as half right."""
    loss = functional.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype))
    with torch.no_grad():
        right = 0.5 + 0.5 * torch.sign(logits) * (2.0 * truth - 1.0)
    return TaskOutput(loss, {"right": right.mean()})


class PairTask(ProxyTask):
    """Does this picture belong to this sound? As many true pairs as false ones in every batch."""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.head = PairScore(config.objective.dim)

    def pair_loss(self, video: Tensor, audio: Tensor, false: Tensor) -> TaskOutput:
        """The loss of embeddings [N, D]: in each row the sound `audio` belongs to the pictures, `false` does not."""
        logits = self.head(torch.cat([video, video]), torch.cat([audio, false]))
        truth = torch.arange(len(logits), device=logits.device) < len(video)
        return binary_output(logits, truth)

    def pair_scores(self, video: Tensor, audio: Tensor) -> Tensor:
        return self.head.every_pair(video, audio)

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return share_right(row)


def share_right(row: Mapping[str, Any]) -> dict[str, float]:
    """Out of a row of logged metrics: the share of right answers, which the progress bar shows."""
    return {"right": row["right"]}


class CorrespondenceTask(PairTask):
    """Is this sound of the picture's clip and time, or of another clip? As many true pairs as false ones in a batch.

    Reference: Arandjelović, Zisserman, "Look, Listen and Learn", ICCV 2017.
    """

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        count = len(batch)
        elements = self.cut(batch, generator)
        video = self.embed_video(elements.video, generator)
        audio = self.embed_audio(elements.audio, generator)
        other = draw_other_clips(batch.clip_ids.cpu(), generator).to(batch.device)
        # Rows 0 to N - 1 are of the past and the others of the future: each half draws its other clips from itself.
        return self.pair_loss(video, audio, audio[torch.cat([other, other + count])])


def draw_other_clips(clip_ids: Tensor, generator: torch.Generator) -> Tensor:
    """[N] row numbers of other clips, each other clip equally likely.

    Raises:
        ValueError: a row has no other clip in the batch.
    """
    allowed = clip_ids[:, None] != clip_ids[None, :]
    if not bool(allowed.any(1).all()):
        raise ValueError("correspondence needs at least two different clips in a batch, clip_ids has one")
    draws = torch.rand(allowed.shape, generator=generator).masked_fill_(~allowed, -1.0)
    return draws.argmax(1)


class TimeArrowTask(ProxyTask):
    """Each clip is shown as it was or reversed, with even chances; only the order of the frames tells which.

    Reference: Wei, Lim, Zisserman, Freeman, "Learning and Using the Arrow of Time", CVPR 2018.
    """

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config, with_audio=False)
        dim = config.objective.dim
        if config.baselines.arrow_pool == "mean":
            self.video_pool = _MeanPool(config.encoder.features, dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    @property
    def frames_needed(self) -> int:
        return self.shortest_span

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        """In evaluation every other clip is reversed."""
        count = len(batch)
        reversed_ = torch.arange(count) % 2 == 1
        if self.training:
            reversed_ = uniform(count, 0.0, 1.0, generator, reversed_.device) < 0.5
        return binary_output(self.arrow(batch, reversed_, generator), (~reversed_).to(batch.device))

    def arrow(self, batch: ClipBatch, reversed_: Tensor, generator: torch.Generator) -> Tensor:
        """Logits [N] of "forward", with the clips that reversed_ [N] marks shown backward."""
        jitter = self.config.augment.time_jitter_frames
        frames = batch.video.shape[1] - jitter
        starts = draw_starts(len(batch), jitter, generator, training=self.training)
        video = cut_video(batch.video, starts, frames)
        chosen = reversed_.to(video.device)
        video[chosen] = video[chosen].flip(1)
        return self.head(self.embed_video(video, generator)).squeeze(1)

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return share_right(row)


class _MeanPool(nn.Module):
    """The mean of the frames, mapped to the embedding width: [N, T, features] -> [N, dim], blind to their order."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.mean(1))


def make_synchronization(config: TaskConfig) -> ProxyTask:
    """The task of config.baselines.sync_mode."""
    kinds: dict[str, Callable[[TaskConfig], ProxyTask]]
    kinds = {"shift": ShiftTask, "curriculum": CurriculumTask, "multiway": MultiwayTask}
    return kinds[config.baselines.sync_mode](config)


class _PairedSpans(ProxyTask):
    """Two spans of each clip, and each one's picture with the other one's sound.

    So every picture and every sound is in as many aligned as false pairs: neither of them alone, nor its place in the
    clip, tells which kind a pair is.
    """

    @property
    def frames_needed(self) -> int:
        return self.span_frames + 2 * self.config.baselines.min_shift_frames - 1

    def embed(self, batch: ClipBatch, least: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings of pictures and sound, each [2 N, D]: a span of each clip, then one `least` to `most` away."""
        frames = self.span_frames
        last = batch.video.shape[1] - frames
        possible = (last + 1) // 2  # for a span in the middle of the clip
        if self.config.baselines.min_shift_frames > possible:
            raise ValueError(
                f"baselines.min_shift_frames must be at most {possible} for spans of {frames} frames in clips of "
                f"{batch.video.shape[1]}, got {self.config.baselines.min_shift_frames}"
            )
        first = draw_starts(len(batch), last, generator)
        second = draw_shifted(first, last, least, most, generator)
        video = torch.cat([cut_video(batch.video, starts, frames) for starts in (first, second)])
        audio = torch.cat([cut_audio(batch.audio, starts, frames) for starts in (first, second)])
        return self.embed_video(video, generator), self.embed_audio(audio, generator)


def _swap_spans(embeddings: Tensor) -> Tensor:
    """[2 N, D]: in each clip's place, the embedding of its other span."""
    return torch.cat(embeddings.chunk(2)[::-1])


class ShiftTask(_PairedSpans, PairTask):
    """Sound of the same clip, aligned with the picture or shifted inside the clip; as many of each in every batch."""

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        video, audio = self.embed(batch, self.config.baselines.min_shift_frames, batch.video.shape[1], generator)
        return self.pair_loss(video, audio, _swap_spans(audio))


class CurriculumTask(_PairedSpans):
    """A margin between aligned and false pairs: first other clips, then far and at last near shifts.

    loss = d^2 for aligned pairs, max(0, margin - d)^2 for false ones; d is the distance of normalised embeddings. Each
    of the three stages takes a third of the run.

    Reference: Korbar, Tran, Torresani, "Cooperative Learning of Audio and Video Models from Self-Supervised
    Synchronization", NeurIPS 2018.
    """

    batches_done: Tensor

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        # Part of the run's state, so that a run that was stopped goes on in its stage.
        self.register_buffer("batches_done", torch.zeros((), dtype=torch.int64))

    @property
    def stage(self) -> int:
        """0: other clips; 1: far shifts; 2: near shifts."""
        batches = self.config.steps * self.config.accumulate
        return min(2, 3 * int(self.batches_done) // batches)

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        baselines, stage = self.config.baselines, self.stage
        longest = batch.video.shape[1]
        shifts = (baselines.far_shift_frames, longest) if stage == 1 else (baselines.min_shift_frames, longest)
        if stage == 2:
            shifts = (baselines.min_shift_frames, baselines.far_shift_frames)
        video, audio = (functional.normalize(side, dim=1) for side in self.embed(batch, *shifts, generator))
        false = _swap_spans(audio)
        if stage == 0:
            other = draw_other_clips(batch.clip_ids.cpu(), generator).to(batch.device)
            false = audio[torch.cat([other, other + len(batch)])]
        near, far = (video - audio).square().sum(1), _distance(video, false)
        loss = 0.5 * (near.mean() + (baselines.margin - far).clamp_min(0).square().mean())
        if self.training:
            self.batches_done += 1
        right = (near.detach() < far.detach().square()).float().mean()
        return TaskOutput(loss, {"right": right, "stage": self.batches_done.new_tensor(stage)})

    def pair_scores(self, video: Tensor, audio: Tensor) -> Tensor:
        return functional.normalize(video, dim=1) @ functional.normalize(audio, dim=1).T

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return share_right(row)


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """[N] distances of rows; the root's gradient stays finite where two are the same."""
    return (first - second).square().sum(1).add(1e-12).sqrt()


class MultiwayTask(ProxyTask):
    """Which frame of a clip belongs to which moment of its sound: cross-entropy over its T x T similarities, both ways.

    Only moments that see nothing of what pads the clip are compared: the others would know their place by it.

    Reference: Chung, Chung, Kang, "Perfect Match: Improved Cross-Modal Embeddings for Audio-Visual Synchronisation",
    ICASSP 2019.
    """

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        dim, features, context = config.objective.dim, config.encoder.features, config.baselines.multiway_context
        # Moments are embedded, not spans: convolutions over a few frames take the place of the pools.
        self.video_pool = _Moments(features, dim, context)
        self.audio_pool = _Moments(features, dim, context)
        self.offset_frames = config.frame_stride
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.zeros(()))

    @property
    def frames_needed(self) -> int:
        moments = self.config.baselines.multiway_context + 1  # of which the two that are embedded can be told apart
        return self.config.augment.time_jitter_frames + 2 * self.margin_frames + self.config.frame_stride * moments

    def forward(self, batch: ClipBatch, generator: torch.Generator) -> TaskOutput:
        return self.score(self.represent(batch, generator), batch)

    def represent(self, batch: ClipBatch, generator: torch.Generator) -> Representations:
        """Embeddings of the moments of each clip, seen and heard, [N, T', D] each."""
        jitter = self.config.augment.time_jitter_frames
        frames = batch.video.shape[1] - jitter
        starts = draw_starts(len(batch), jitter, generator, training=self.training)
        return self._embed(cut_video(batch.video, starts, frames), cut_audio(batch.audio, starts, frames), generator)

    def score(self, representations: Representations, batch: ClipBatch) -> TaskOutput:
        similarity = self._similarity(representations)
        count, moments = similarity.shape[:2]
        truth = torch.arange(moments, device=similarity.device).expand(count, -1)
        loss = 0.5 * (
            functional.cross_entropy(similarity.flatten(0, 1), truth.flatten())
            + functional.cross_entropy(similarity.mT.flatten(0, 1), truth.flatten())
        )
        right = (similarity.detach().argmax(2) == truth).float().mean()
        return TaskOutput(loss, {"right": right})

    def similarity(self, video: Tensor, audio: Tensor, generator: torch.Generator) -> Tensor:
        """[N, T', T'] similarity of each moment's picture with each moment's sound, with the learned scale and shift.

        T' is the number of moments less multiway_context - 1.
        """
        return self._similarity(self._embed(video, audio, generator))

    def _embed(self, video: Tensor, audio: Tensor, generator: torch.Generator) -> Representations:
        phase, stride = self.draw_phase(generator), self.config.frame_stride
        least = self.frames_needed - self.config.augment.time_jitter_frames
        if video.shape[1] < least:
            raise ValueError(f"video must have at least {least} frames for two moments, got {video.shape[1]}")
        moments = self.moments(video.shape[1], phase)
        frames = self.video_pool(self.frame_features(video, phase, generator)[:, moments]).float()
        sounds = self.audio_pool(self.audio_features(audio, generator)[:, phase::stride][:, moments]).float()
        return [frames, sounds]

    def _similarity(self, representations: Representations) -> Tensor:
        frames, sounds = (functional.normalize(side, dim=2) for side in representations if side is not None)
        return self.log_scale.exp() * (frames @ sounds.mT) + self.bias

    def group_metrics(self, row: Mapping[str, Any]) -> dict[str, float]:
        return share_right(row)

    def offset_scores(self, batch: ClipBatch, generator: torch.Generator) -> Tensor:
        """Mean similarities along the diagonals of the T x T table; offsets of up to half the clip."""
        similarity = self.similarity(batch.video, batch.audio, generator)
        most = similarity.shape[1] // 2
        return torch.stack([similarity.diagonal(k, 1, 2).mean(1) for k in range(-most, most + 1)], 1)


class _Moments(nn.Module):
    """Embeddings of moments: [N, T, features] -> [N, T - context + 1, dim], each of `context` frames, none padded."""

    def __init__(self, features: int, dim: int, context: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(features, dim, context)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.conv(x.transpose(1, 2)).relu().transpose(1, 2))
