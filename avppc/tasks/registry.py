"""The proxy tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from avppc.checks import check_choice
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


def make_task(name: str, config: TaskConfig) -> ProxyTask:
    """A new task with its encoder; ValueError for a name that is not in TASKS, or settings that do not fit the task."""
    check_choice("task", name, TASKS)
    if not isinstance(config, TaskConfig):
        raise TypeError(f"config must be a TaskConfig, got {type(config).__name__}")
    if (config.subtasks or config.exclude) and not name.endswith("permutative"):
        raise ValueError(f"subtasks and exclude are settings of the permutative tasks, task is {name!r}")
    return TASKS[name].make(config)
