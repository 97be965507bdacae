"""SIGTERM and Ctrl-C while a run trains: all processes end after the same step, whose checkpoint is written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from avppc.processes_interrupts import tell
from avppc.train.distributed import Processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notices SIGTERM and SIGINT while it is open. Asked once a step, it gives the same answer on all processes:
    whether to stop. A second Ctrl-C ends the process at once, by KeyboardInterrupt.

    With several processes the answer is that of the step before, since it travels while the step computes.
    """

    def __init__(self, processes: Processes) -> None:
        self.signal: int = signal.SIGTERM
        """The signal that came first; SIGTERM where it came to another process."""
        self._processes = processes
        self._asked = False
        self._flag: torch.Tensor | None = None
        self._work: Any = None
        self._previous: dict[int, Any] = {}
        self._previous_wakeup = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous_wakeup = signal.set_wakeup_fd(-1)  # whoever else ends this process by signals waits
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self._previous:
            signal.set_wakeup_fd(self._previous_wakeup)
        if error is None and self._work is not None:
            self._work.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._asked:
                raise KeyboardInterrupt
            tell("stopping after this step, which is going to be saved; Ctrl-C once more ends it at once")
        if not self._asked:
            self._asked, self.signal = True, number

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
