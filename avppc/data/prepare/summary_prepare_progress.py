"""The progress bar of `avppc index` and `prepare`: videos done, clips a second, time left; lines instead of a bar in a
log."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from avppc.data.prepare.worker_notes import kind_of
from avppc.printing import Console, TextColumn, as_line

_LOG_SECONDS = 15.0
KINDS_SHOWN = 8


class PrepareProgress:
    """Counts videos and clips (or, where there are none, the videos a second)."""

    def __init__(self, console: Console, videos: int, title: str = "prepare") -> None:
        self._title = title
        self._console = console
        self._videos = videos
        self._done = 0
        self._clips = 0
        self._started = self._logged = time.monotonic()
        self._bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("videos  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=videos, rate="")

    def add(self, videos: int, clips: int) -> None:
        """Counts what was done since the last call."""
        self._done += videos
        self._clips += clips
        self._bar.update(self._task, completed=self._done, rate=self._rate())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._logged >= _LOG_SECONDS:
            self._logged = now
            left = (now - self._started) / max(self._done, 1) * (self._videos - self._done)
            self._line(f", {left:.0f} s left")

    def _rate(self) -> str:
        count, what = (self._clips, "clips") if self._title == "prepare" else (self._done, "videos")
        return f"{count / max(time.monotonic() - self._started, 1e-3):.0f} {what}/s"

    def _line(self, end: str = "") -> None:
        text = f"{self._title}: {self._done} of {self._videos} videos, {self._rate()}{end}"
        self._console.print(text)

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if not self._console.is_terminal:
            self._line()


def print_kinds(title: str, name: str, texts: list[str]) -> None:
    """How often each kind of text (what stands before its details) occurs."""
    if not texts:
        return
    print(f"  {title}: {len(texts):,}, listed in {name}")
    kinds = Counter(kind_of(as_line(text)) for text in texts).most_common()
    for kind, count in kinds[:KINDS_SHOWN]:
        print(f"    {count:6,}  {kind}")
    if len(kinds) > KINDS_SHOWN:
        print(f"    {sum(count for _, count in kinds[KINDS_SHOWN:]):6,}  of {len(kinds) - KINDS_SHOWN} other kinds")
