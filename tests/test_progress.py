"""Progress: a bar where there is a terminal, lines where there is none."""

from __future__ import annotations

import io

import pytest

from avppc import progress
from avppc.printing import Console
from avppc.progress import ProgressBar


class Clock:
    """Stands in for the clock: it goes on when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_without_a_terminal_there_is_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(monkeypatch), io.StringIO()
    bar = ProgressBar("prepare", 100, "videos", done=20, rated="clips", console=Console(file=file, width=30))
    with bar:
        for _ in range(4):
            clock.now += 5
            bar.advance(5, rated=10)
        bar.show("of\nspeaker 3")
        bar.advance(-5, rated=-10)
        assert file.getvalue() == "prepare: 35 of 100 videos, 2.0 clips/s, 65 s left\n"
    assert file.getvalue().splitlines()[1:] == [r"prepare: 35 of 100 videos, 1.5 clips/s  of\nspeaker 3"]


def test_no_rest_is_foretold_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(monkeypatch), io.StringIO()
    with ProgressBar("embed", 7, "clips", done=7, console=Console(file=file)) as bar:
        clock.now += 60
        bar.advance(0)
    assert file.getvalue() == 2 * "embed: 7 of 7 clips, 0.0 clips/s\n"


def test_the_last_line_comes_though_the_work_failed() -> None:
    file = io.StringIO()

    def fail() -> None:
        with ProgressBar("embed", 7, "clips", console=Console(file=file)) as bar:
            bar.advance(3)
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fail()
    assert file.getvalue().startswith("embed: 3 of 7 clips")


def test_in_a_terminal_there_is_a_bar_with_the_text_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    with ProgressBar("pretrain", 4, "steps", console=Console(file=file, force_terminal=True, width=120)) as bar:
        bar.advance()
        bar.show("loss 0.123  [bold]\x1b]0;x")
        bar.advance()
    last = file.getvalue().split("pretrain")[-1]
    assert "2/4" in last
    assert "steps/s" in last
    assert r"loss 0.123  [bold]\x1b]0;x" in last
    assert "pretrain: 2 of 4" not in file.getvalue()
