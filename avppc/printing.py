"""How the commands print: names of files and all other text from outside reach the terminal as text, never as commands.

A file name may hold an escape sequence that moves the cursor, renames the window or fills the clipboard, or characters
that turn the order of the text around; square brackets in it would be markup to rich. `main` escapes what is printed
(`escaped_output`); consoles and progress columns come from here, never from rich, and know no markup. What a command
only says, on standard error, never ends its work: neither a full disk below a log file nor a closed pipe.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, TextIO

import rich.console
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

# Control characters (C0 but for tabs and ends of lines, DEL, C1), those that turn the direction of text, those that end
# a line or a paragraph, tags that nobody sees, and halves of characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")

_LINE_SECONDS = 15.0  # between two lines about progress where there is no terminal
_QUOTED = re.compile(r"\w*(?:Error|Exception): \S")
_SAYS_LITTLE = ("Could not load this library", "cannot open shared object file")


def as_line(text: str) -> str:
    """The text in one line: with escapes such as \\x1b as by visible(), and \\n for ends of lines."""
    return visible(text).replace("\n", "\\n")


def counted(number: int, thing: str) -> str:
    """For example "1 word", "1,200 words"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def visible(text: str) -> str:
    """The text with escapes such as \\x1b for what would command the terminal or deceive the eye; lines stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Console(rich.console.Console):
    """rich's Console without markup and emoji codes, which prints a str as one line and escapes as visible() does.

    Inside `quiet` one on standard error shows nothing, unless it is made with quiet=False.
    """

    shows_progress = True

    def __init__(self, **settings: Any) -> None:
        silent = bool(settings.get("stderr")) and not Console.shows_progress
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, "quiet": silent, **settings})

    @property
    def file(self) -> IO[str]:
        """The stream below an escaped one, also below one that rich lays over it while a bar is shown."""
        file = super().file
        while isinstance(file, _EscapedStream):
            file = file.rich_proxied_file
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(as_line(item) if isinstance(item, str) else item for item in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)  # before it is laid out

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class TextColumn(rich.progress.TextColumn):
    """rich's, without markup."""

    def __init__(self, text: str) -> None:
        super().__init__(text, markup=False)

    def render(self, task: rich.progress.Task) -> Text:
        return Text(as_line(super().render(task).plain))


class _EscapedStream:
    """A text stream that escapes what is written to it, as visible() does; what a Console writes is escaped already."""

    colours = False
    """Whether colours may pass: those of tyro, which prints by itself."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        parts = _COLOUR.split(text) if _EscapedStream.colours else [text]
        self.rich_proxied_file.write(
            "".join(part if number % 2 else visible(part) for number, part in enumerate(parts))
        )
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escapes, as visible() does, whatever is printed inside the block, by warnings and logs too."""
    streams: tuple[Any, Any] = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _EscapedStream(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def colours_pass() -> Iterator[None]:
    """Lets escape sequences of colours through inside the block."""
    _EscapedStream.colours = True
    try:
        yield
    finally:
        _EscapedStream.colours = False


@contextlib.contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Shows no progress inside the block."""
    Console.shows_progress, before = not on, Console.shows_progress
    try:
        yield
    finally:
        Console.shows_progress = before


def one_line(error: BaseException) -> str:
    """The text of an error in one line: its first line, and the most telling one of the errors that it quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    quoted = [line for line in lines[1:] if _QUOTED.match(line)]
    telling = [line for line in quoted if not any(text in line for text in _SAYS_LITTLE)]
    found = (telling or quoted or (lines[1:] if lines[0].endswith(":") else []))[:1]
    if not found:
        return lines[0]
    return f"{lines[0].removesuffix('Likely causes:').rstrip(' .:')}: {found[0]}"


class _LenientStream:
    """A text stream that drops, without an error, what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            drop_held_back(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop_held_back(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_stderr() -> Iterator[None]:
    """Inside the block, what cannot be written to sys.stderr is dropped without an error."""
    strict = sys.stderr
    if strict is None:  # closed before Python started
        yield
        return
    sys.stderr = _LenientStream(strict)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = strict


def drop_held_back(stream: TextIO) -> None:
    """Empties the buffer of a stream that cannot be written to: at its end Python tries again, and exits with 120."""
    with contextlib.suppress(OSError, ValueError):  # no file, or closed
        descriptor = stream.fileno()
        kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, descriptor)
            stream.flush()
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)
            os.close(nowhere)


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
        self._prints_lines = not (self._console.is_interactive or self._console.is_jupyter or self._console.quiet)
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{as_line(unit)}  {{task.fields[rate]}}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._prints_lines or self._console.quiet,
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
        if self._prints_lines and now - self._printed >= _LINE_SECONDS:
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

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._prints_lines:
            self._print_line()


class _Bar(rich.progress.Progress):
    """rich's, with a text below it."""

    text = ""

    def get_renderables(self) -> Iterable[rich.console.RenderableType]:
        yield from super().get_renderables()
        if self.text:
            yield Text(as_line(self.text))
