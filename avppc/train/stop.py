"""SIGTERM, which a cluster sends before it takes a machine away: all processes end after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from avppc.train.processes import Processes

EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of `avppc pretrain` when SIGTERM ended it and its checkpoint is written: 143."""


class Stopped(Exception):
    """A signal ended the run; its checkpoint is written."""


class StopRequest:
    """Notices SIGTERM while it is open. Asked once a step, it gives the same answer on all processes: whether to stop.

    With several processes the answer is that of the step before, since it travels while the step computes.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._asked = False
        self._flag: torch.Tensor | None = None
        self._work: Any = None
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        if error is None and self._work is not None:
            self._work.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop."""
        if self._processes.size == 1:
            return self._asked
        stop = False
        if self._work is not None:
            self._work.wait()
            assert self._flag is not None
            stop = bool(self._flag)
        self._flag = torch.tensor(self._asked, dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return stop
