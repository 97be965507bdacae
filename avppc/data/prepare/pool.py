"""Processes that work through units of videos, one unit after the other.

A video may crash or hang the decoder: its process is then replaced, and the video refused when that happens again. A
decoder hangs when it gives nothing for so many seconds of its own processor time, or waits for so long; time in which
it, this process or the machine is stopped does not count.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from avppc.data.scan import Video
from avppc.processes import ctrl_c_waits, follow_parent, is_held_up, limit_memory, limit_seconds, process_context

TIMED_OUT = "the decoder gives nothing for"
KILLED = "it crashes the decoder (signal 9"  # by somebody, or for lack of memory
PASSING = (TIMED_OUT, KILLED)
"""Beginnings of the reasons that need not be the video's fault: the next command tries such a video again."""
_TURN_SECONDS = 1.0
_MAX_FAILURES = 2  # of the process that works on a video, before the video is refused


@dataclass(frozen=True)
class Unit:
    """A unit of work: videos that one process decodes, one after the other, and whose result is kept as a whole."""

    name: str
    digest: str
    """SHA-256 of all that the result depends on (settings and videos): equal digests give equal results."""
    videos: tuple[Video, ...]


@dataclass(frozen=True)
class Progress:
    """A step forward: how many videos and clips were done, or which unit is finished and with what result."""

    videos: int = 0
    clips: int = 0
    unit: Unit | None = None
    record: Any = None


class Report:
    """The messages of a worker process to its parent; each one about a video also renews the video's time limit."""

    def __init__(self, connection: Connection[Any, Any], timeout_seconds: float) -> None:
        self._connection = connection
        self._timeout_seconds = timeout_seconds
        self._path = ""

    def video(self, path: str) -> None:
        """The worker begins with this video, or is still alive with it; "": with work that no video is to blame for."""
        if path != self._path:
            limit_memory()
        self._path = path
        self._renew()
        self._connection.send(("video", path))

    def clip(self) -> None:
        """A clip is done."""
        self._renew()
        self._connection.send(("clip", None))

    def video_done(self) -> None:
        """The video is done, successfully or not."""
        self._connection.send(("video done", None))

    def _renew(self) -> None:
        limit_seconds(self._timeout_seconds if self._path else None)


class Job(Protocol):
    """What is done with a unit; pickled once for each process."""

    def handle(self, unit: Unit, refused: dict[str, str], report: Report) -> Any:
        """Works through the unit's videos and returns the result; those in `refused` (path: reason) are left out."""

    def clean_up(self) -> None:
        """Removes half-written files of processes that were killed."""


class WorkerPool:
    """Worker processes, each with the job; they stay between the calls of `run`. Used as a context manager.

    Args:
        job: pickled once for each process.
        processes: how many.
        timeout_seconds: after which a video that gives nothing has failed.
    """

    def __init__(self, job: Job, processes: int, timeout_seconds: float) -> None:
        self._workers = [_Worker(job, timeout_seconds) for _ in range(processes)]

    def run(self, units: Sequence[Unit]) -> Iterator[Progress]:
        """Works through the units; yields each step forward as it is made. After an error the pool is to be closed.

        Raises:
            OSError, ImportError: of the job.
        """
        pending: deque[tuple[Unit, dict[str, str]]] = deque((unit, {}) for unit in units)
        failures: Counter[tuple[str, str]] = Counter()
        for worker in self._workers[: len(units)]:
            worker.begin(*pending.popleft())
        while busy := [worker for worker in self._workers if worker.unit is not None]:
            wait([worker.connection for worker in busy], timeout=_TURN_SECONDS)
            for worker in busy:
                try:
                    yield from worker.messages()
                except _WorkerLost as lost:
                    unit, refused = worker.unit, worker.refused
                    assert unit is not None
                    failures[unit.name, lost.path] += 1
                    if failures[unit.name, lost.path] >= _MAX_FAILURES:
                        if not lost.path:
                            raise RuntimeError(f"the processes that decode end outside of any video: {lost}") from lost
                        refused = refused | {lost.path: lost.reason}
                    yield Progress(videos=-worker.videos_done, clips=-worker.clips_done)
                    worker.restart()
                    worker.begin(unit, refused)
                if worker.unit is None and pending:
                    worker.begin(*pending.popleft())

    def close(self) -> None:
        """Ends the processes at once."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def handle_units(job: Job, units: Sequence[Unit], processes: int, timeout_seconds: float) -> Iterator[Progress]:
    """Works through the units in worker processes; yields each step forward as it is made.

    Raises:
        OSError: a result cannot be written (the disk is full, say). Finished units stay.
    """
    try:
        with WorkerPool(job, min(processes, len(units)), timeout_seconds) as pool:
            yield from pool.run(units)
    finally:
        job.clean_up()


class _WorkerLost(Exception):
    """The process died or hangs, while it works on the video `path` or, where that is "", on none."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


class _Worker:
    """One worker process, as the parent sees it."""

    def __init__(self, job: Job, timeout_seconds: float) -> None:
        self._job = job
        self._timeout_seconds = timeout_seconds
        self.unit: Unit | None = None
        self.refused: dict[str, str] = {}
        self.videos_done = 0
        self.clips_done = 0
        self._start()

    def _start(self) -> None:
        context = process_context("avppc.data.prepare.worker")
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, self._job, self._timeout_seconds), daemon=True
        )
        with ctrl_c_waits():
            self._process.start()
        theirs.close()

    def begin(self, unit: Unit, refused: dict[str, str]) -> None:
        """Gives the process a unit; the videos in `refused` are left out with that reason."""
        self.unit, self.refused = unit, refused
        self.videos_done = self.clips_done = 0
        self._current = ""
        self._looked, self._silent_seconds = time.monotonic(), 0.0
        with contextlib.suppress(BrokenPipeError):  # it has died: messages() is going to notice
            self.connection.send((unit, refused))

    def messages(self) -> Iterator[Progress]:
        """The progress that the process has reported since the last call; raises _WorkerLost where it died or hangs."""
        try:
            while self.unit is not None and self.connection.poll():
                kind, value = self.connection.recv()
                self._silent_seconds = 0.0
                if kind == "video":
                    self._current = value
                elif kind == "clip":
                    self.clips_done += 1
                    yield Progress(clips=1)
                elif kind == "video done":
                    self.videos_done += 1
                    yield Progress(videos=1)
                elif kind == "error":
                    raise value
                else:
                    unit, self.unit = self.unit, None
                    yield Progress(unit=unit, record=value)
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise _WorkerLost(self._current, self._end_of_process()) from None
        now = time.monotonic()
        waited, self._looked = min(now - self._looked, 2 * _TURN_SECONDS), now  # more: this process was stopped itself
        if self.unit is not None and self._current and not is_held_up(self._process.pid or 0):
            self._silent_seconds += waited
            if self._silent_seconds > self._timeout_seconds:
                raise _WorkerLost(self._current, self._time_out())

    def _end_of_process(self) -> str:
        """Why the process has ended by itself."""
        code = self._process.exitcode or 0
        if code == -getattr(signal, "SIGXCPU", 0):
            return self._time_out()
        cause = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"it crashes the decoder ({cause})"

    def _time_out(self) -> str:
        return f"{TIMED_OUT} {self._timeout_seconds:g} s"

    def restart(self) -> None:
        """Replaces the process by a new one."""
        self.stop()
        self._start()

    def stop(self) -> None:
        """Ends the process at once."""
        self.connection.close()
        self._process.kill()
        self._process.join()


def _work(connection: Connection[Any, Any], job: Job, timeout_seconds: float) -> None:
    """Main function of a process: takes units until the parent hangs up."""
    follow_parent()
    torch.set_num_threads(1)
    report = Report(connection, timeout_seconds)
    while True:
        try:
            unit, refused = connection.recv()
            connection.send(("done", job.handle(unit, refused, report)))
        except (EOFError, BrokenPipeError):
            return
        except (OSError, ImportError) as error:
            connection.send(("error", error))
            return
