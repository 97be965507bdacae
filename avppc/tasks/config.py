"""Settings that the proxy tasks read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from avppc.checks import check_integer, check_number, check_types
from avppc.clip import CLIP_FRAMES
from avppc.data.config import AugmentConfig
from avppc.losses.config import ObjectiveConfig
from avppc.models.config import EncoderConfig
from avppc.ops.log_mel.config import LogMelConfig

__all__ = ["BaselineConfig", "CutConfig", "RivalConfig", "TaskConfig"]

TaskName = Literal["synchronization", "time-arrow", "correspondence", "visual-permutative", "av-permutative"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
"""In the order of the published table."""


@dataclass(frozen=True)
class BaselineConfig:
    """Settings of the proxy tasks that permutative predictive coding is compared with."""

    BEFORE: ClassVar[dict[str, int]] = {"multiway_context": 5}
    """What a file means that lacks a field: it was written before there was one."""

    sync_mode: Literal["shift", "curriculum", "multiway"] = "shift"
    """Synchronization: "shift", is the sound aligned or shifted inside its clip; "curriculum", a margin between aligned
    and false pairs that come closer as training goes on; "multiway", which frame of the clip belongs to which sound."""
    multiway_context: int = 3
    """Encoded frames that one moment's embedding sees under "multiway"."""
    min_shift_frames: int = 4
    """The least shift of shifted sound, in video frames."""
    far_shift_frames: int = 8
    """The least shift in the middle stage of the curriculum, in video frames."""
    margin: float = 1.0
    """Distance beyond which the curriculum pushes false pairs no further apart."""
    arrow_pool: Literal["gru", "mean"] = "gru"
    """How the time arrow's head sees the frames: in order, or (a control that cannot tell the order) their mean."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("multiway_context", self.multiway_context, 1, CLIP_FRAMES)
        check_integer("min_shift_frames", self.min_shift_frames, 1)
        check_integer("far_shift_frames", self.far_shift_frames, self.min_shift_frames)
        check_number("margin", self.margin, 0)


RivalConfig = BaselineConfig
"""Its former name."""


@dataclass(frozen=True)
class CutConfig:
    """Which frames are the past and which the future; the frames between them are seen by neither."""

    past_frames: int = 14
    """Frames of the past, from the start of the clip."""
    gap_frames: int = 1
    """Frames left out between past and future."""
    future_frames: int = 14
    """Frames of the future, right after the gap."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("past_frames", self.past_frames, 2)
        check_integer("gap_frames", self.gap_frames, 0)
        check_integer("future_frames", self.future_frames, 2)
        if self.past_frames != self.future_frames:
            raise ValueError(
                f"past_frames and future_frames must be equal (they share one encoder batch), "
                f"got {self.past_frames} and {self.future_frames}"
            )
        if self.frames > CLIP_FRAMES:
            raise ValueError(
                f"past_frames, gap_frames and future_frames must be at most {CLIP_FRAMES} in all, got {self.frames}"
            )

    @property
    def frames(self) -> int:
        """Frames of a clip that the cut uses."""
        return self.past_frames + self.gap_frames + self.future_frames

    @property
    def future_start(self) -> int:
        """First frame of the future."""
        return self.past_frames + self.gap_frames


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a proxy task is made from: the part of PretrainConfig that tasks read."""

    FORMER_NAMES: ClassVar[dict[str, str]] = {"rivals": "baselines"}
    """Fields by the names that files, flags and tables may still give them."""

    task: TaskName = "av-permutative"
    """The proxy task: "av-permutative" (all 42 sub-tasks), "visual-permutative" (picture alone), "synchronization",
    "time-arrow" or "correspondence"."""
    subtasks: str = ""
    """Sub-tasks to learn: groups (1to1, 1to2, 2to1, 2to2, between, within, mixed) or names such as "Vp,Ap->Vf", with
    commas between them; empty: all of the task."""
    exclude: str = ""
    """Sub-tasks to leave out, in the same way."""
    steps: int = 1000
    """Optimiser steps in all."""
    accumulate: int = 1
    """Batches whose gradients are averaged before a step; with scale.cached_negatives they share one loss."""
    gather: Literal["none", "all", "ring"] = "all"
    """Negatives under torchrun: "none", each process's own clips; "all" or "ring", the clips of all processes: copied
    to each, or passed round, with the memory of one process and more arithmetic."""
    frame_stride: int = 1
    """One frame in so many is encoded, from a random first one; motion is taken at the full rate."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The visual encoder."""
    audio_width: int = 16
    """Channels of the audio encoder's first layer."""
    features: LogMelConfig = field(default_factory=lambda: LogMelConfig(bands=40))
    """The audio features; their hop must give 4 frames a video frame."""
    cut: CutConfig = field(default_factory=CutConfig)
    """Past, gap and future."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Variation of the training clips."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss of the permutative tasks; its embedding width also serves the other tasks."""
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    """The tasks "synchronization" and "time-arrow"."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("steps", self.steps, 1)
        check_integer("accumulate", self.accumulate, 1)
        check_integer("audio_width", self.audio_width, 4)
        if self.augment.time_jitter_frames > self.cut.past_frames - 2:
            raise ValueError(
                f"augment.time_jitter_frames must leave 2 of cut.past_frames={self.cut.past_frames} frames, "
                f"got {self.augment.time_jitter_frames}"
            )
        check_integer("frame_stride", self.frame_stride, 1, self.cut.past_frames - self.augment.time_jitter_frames)
