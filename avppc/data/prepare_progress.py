"""The progress bar of `avppc prepare`: videos done, clips a second, time left; lines instead of a bar in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LOG_SECONDS = 15.0


class PrepareProgress:
    """Counts videos and clips."""

    def __init__(self, console: Console, videos: int) -> None:
        self._console = console
        self._videos = videos
        self._done = 0
        self._clips = 0
        self._started = self._logged = time.monotonic()
        self._bar = Progress(
            TextColumn("prepare"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("videos  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("prepare", total=videos, rate="")

    def add(self, videos: int, clips: int) -> None:
        """Counts what was done since the last call."""
        self._done += videos
        self._clips += clips
        self._bar.update(self._task, completed=self._done, rate=f"{self._clips_per_second():.0f} clips/s")
        now = time.monotonic()
        if not self._console.is_terminal and now - self._logged >= _LOG_SECONDS:
            self._logged = now
            left = (now - self._started) / max(self._done, 1) * (self._videos - self._done)
            self._line(f", {left:.0f} s left")

    def _clips_per_second(self) -> float:
        return self._clips / max(time.monotonic() - self._started, 1e-3)

    def _line(self, end: str = "") -> None:
        text = f"prepare: {self._done} of {self._videos} videos, {self._clips_per_second():.0f} clips/s{end}"
        self._console.print(text, highlight=False)

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if not self._console.is_terminal:
            self._line()
