"""The proxy tasks by name."""

from __future__ import annotations

from collections.abc import Callable

from avppc.config.pretrain import PretrainConfig
from avppc.tasks.permutative_task import PermutativeTask
from avppc.tasks.protocol import ProxyTask

TASKS: dict[str, Callable[[PretrainConfig], ProxyTask]] = {"av-permutative": PermutativeTask}


def make_task(name: str, config: PretrainConfig) -> ProxyTask:
    """A new task with its encoder; ValueError for a name that is not in TASKS."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {name!r}")
    return TASKS[name](config)
