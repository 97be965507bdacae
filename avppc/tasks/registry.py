"""The proxy tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import nn

from avppc.checks import check_choice
from avppc.models.encoders import OwnEncoder, VideoEncoder
from avppc.tasks.base import ProxyTask
from avppc.tasks.baselines import CorrespondenceTask, TimeArrowTask, make_synchronization
from avppc.tasks.config import TaskConfig
from avppc.tasks.permutative import make_av_permutative
from avppc.tasks.visual import make_visual_permutative


class TaskEntry(NamedTuple):
    """A proxy task that can be chosen."""

    title: str
    """Its name in tables."""
    make: Callable[[TaskConfig], ProxyTask]
    """A new task with its encoder."""


TASKS: dict[str, TaskEntry] = {
    "synchronization": TaskEntry("AV synchronization", make_synchronization),
    "time-arrow": TaskEntry("Time arrow", TimeArrowTask),
    "correspondence": TaskEntry("AV correspondence", CorrespondenceTask),
    "visual-permutative": TaskEntry("Visual permutative predictive coding", make_visual_permutative),
    "av-permutative": TaskEntry("AV permutative predictive coding", make_av_permutative),
}
"""In the order of TASK_NAMES."""


def make_task(name: str, config: TaskConfig, encoder: nn.Module | None = None) -> ProxyTask:
    """A new task with its encoder; ValueError for a name that is not in TASKS, or settings that do not fit the task.

    Args:
        name: as in the settings of pretraining.
        config: settings; those of the task's own name are not looked at.
        encoder: a module [N, T, H, W] -> [N, T, config.encoder.features] in VideoEncoder's place; None: VideoEncoder.
    """
    check_choice("task", name, TASKS)
    if not isinstance(config, TaskConfig):
        raise TypeError(f"config must be a TaskConfig, got {type(config).__name__}")
    if (config.subtasks or config.exclude) and not name.endswith("permutative"):
        raise ValueError(f"subtasks and exclude are settings of the permutative tasks, task is {name!r}")
    return with_encoder(TASKS[name].make(config), encoder)


def with_encoder(task: ProxyTask, encoder: nn.Module | None) -> ProxyTask:
    """The task with a visual encoder of one's own, unless that is None."""
    if encoder is not None:
        task.video_encoder = cast("VideoEncoder", OwnEncoder(encoder, task.config.encoder.features))
    return task
