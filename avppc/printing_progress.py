"""The progress bar of the commands that go through clips: how many are done, clips a second, time left."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from avppc.printing import Console, TextColumn


def clip_progress() -> Progress:
    """A bar on standard error whose tasks count clips."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _ClipRate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _ClipRate(ProgressColumn):
    """Clips a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f} clips/s")
