"""How far a command is: a bar in a terminal; elsewhere, as in a log file, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from avppc.printing import Console, TextColumn, as_line

LINE_SECONDS = 15.0
"""Time between two lines where there is no terminal."""


class ProgressBar:
    """The progress of one piece of work, on standard error; used as a context manager.

    Args:
        name: of the work.
        total: how many there are to do.
        unit: what is counted, such as "clips".
        done: how many of them an earlier call has done.
        rated: what is counted a second, if something else than `unit`.
        console: where to show it, if the caller prints there meanwhile.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        rated: str | None = None,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._name, self._total, self._unit, self._rated = name, total, unit, rated or unit
        self._done = self._done_before = done
        self._rated_done = 0
        self._text = ""
        self._started = self._printed = time.monotonic()
        self._prints_lines = not (self._console.is_interactive or self._console.is_jupyter)
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{as_line(unit)}  {{task.fields[rate]}}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._prints_lines,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, rate="")

    def advance(self, count: int = 1, rated: int | None = None) -> None:
        """Counts what was done since the last call; negative where work is to be done again.

        Args:
            rated: how many of what is counted a second; None: `count`.
        """
        self._done += count
        self._rated_done += count if rated is None else rated
        self._bar.update(self._task, completed=self._done, rate=self._rate())
        now = time.monotonic()
        if self._prints_lines and now - self._printed >= LINE_SECONDS:
            self._printed = now
            done = self._done - self._done_before
            left = (now - self._started) / done * (self._total - self._done) if done > 0 else None
            self._print_line("" if left is None else f", {left:.0f} s left")

    def show(self, text: str) -> None:
        """Shows a text below the bar, or at the end of each line, until the next one comes."""
        self._text = self._bar.text = text

    def _rate(self) -> str:
        rate = self._rated_done / max(time.monotonic() - self._started, 1e-3)
        return f"{rate:.{1 if rate < 10 else 0}f} {self._rated}/s"

    def _print_line(self, left: str = "") -> None:
        text = f"  {self._text}" if self._text else ""
        line = f"{self._name}: {self._done} of {self._total} {self._unit}, {self._rate()}{left}{text}"
        self._console.print(line, soft_wrap=True)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._prints_lines:
            self._print_line()


class _Bar(Progress):
    """rich's, with a text below it."""

    text = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.text:
            yield Text(as_line(self.text))
