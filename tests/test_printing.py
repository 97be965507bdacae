"""Whatever a file is called, its name is printed as text: no command for the terminal, no markup."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from make_videos import write_video
from rich.table import Table

from avppc import printing
from avppc.cli import main
from avppc.printing import Console, ProgressBar, as_line, escaped_output, lenient_stderr, quiet, visible

HOSTILE = "a\x1b]0;owned\x07\x9b31m\u202e[b][bold]\r\x7f"
SHOWN = r"a\x1b]0;owned\x07\x9b31m\u202e[b][bold]\r\x7f"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check_printed(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    told = "".join(capsys.readouterr())
    assert not UNSAFE.search(told)
    for part in parts:
        assert part in told.replace("\n", "")


@pytest.mark.parametrize(
    "flags",
    [
        ["index", "--data", "{}"],
        ["prepare", "--data", "{}", "--out", "{}/out"],
        ["check-sync", "--data", "{}"],
        ["pretrain", "--data", "{}", "--out", "{}/out"],
        ["evaluate", "--run", "{}"],
        ["table", "--data", "{}", "--out", "{}/out"],
        ["diagnose", "--run", "{}"],
        ["report", "--run", "{}"],
        ["export", "{}", "--out", "{}/out"],
        ["embed", "{}", "--encoder", "{}", "--out", "{}.npz"],
        ["features", "{}"],
        ["synth", "--out", "{}"],
    ],
    ids=lambda flags: flags[0],
)
def test_errors_of_every_command(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / HOSTILE).write_text("neither a folder nor a file of any use")
    if flags[0] == "table":
        (tmp_path / HOSTILE).unlink()
    assert main([flag.format(HOSTILE) for flag in flags]) == 2
    check_printed(capsys, SHOWN)


@pytest.mark.parametrize("flags", [[HOSTILE], ["index", f"--{HOSTILE}"], ["index", "--data", "x", "--frames", HOSTILE]])
def test_bad_arguments(flags, capsys):
    try:
        code = main(flags)
    except SystemExit as end:
        code = end.code
    assert code == 2
    check_printed(capsys)


def test_commands_that_succeed(tmp_path, capsys):
    data = tmp_path / f"{HOSTILE}data"
    data.mkdir()
    write_video(data / f"{HOSTILE}.mp4", size=(48, 64))
    (data / f"{HOSTILE}.mkv").write_bytes(b"no video")
    assert main(["index", "--data", str(data), "--workers", "1"]) == 3
    check_printed(capsys, SHOWN)
    out = tmp_path / f"{HOSTILE}out"
    for _ in range(2):
        assert main(["prepare", "--data", str(data), "--out", str(out), "--workers", "1"]) == 3
        check_printed(capsys, SHOWN)
    features = tmp_path / f"{HOSTILE}.npy"
    assert main(["features", str(data / f"{HOSTILE}.mp4"), "--out", str(features)]) == 0
    check_printed(capsys, f"wrote {tmp_path}/{SHOWN}.npy")


def test_what_a_foreign_manifest_says(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    video = write_video(data / "a.mp4", size=(48, 64))
    assert main(["index", "--data", str(data), "--workers", "1"]) == 0
    manifest = data / "manifest.jsonl"
    entry = json.loads(manifest.read_text()) | {"video_codec": f"{HOSTILE}\n  problems: none", "notes": [HOSTILE]}
    manifest.write_text(json.dumps(entry) + "\n")
    assert video.exists()
    capsys.readouterr()
    assert main(["index", "--data", str(data), "--workers", "1"]) == 0
    check_printed(capsys, SHOWN + r"\n  problems: none (1)")


def test_an_end_of_line_in_a_name_begins_no_line(tmp_path, capsys):
    assert main(["report", "--run", str(tmp_path / "a\navppc: all is well")]) == 2
    assert "\n  avppc: all is well" in capsys.readouterr().err


def test_no_markup_anywhere():
    file = io.StringIO()
    console = Console(file=file, width=200)
    table = Table(title="t[/b]", caption="c[bold]")
    table.add_column("h[/x]")
    table.add_row("r[red]\x1b[2K")
    console.print("encoder written to x[/b]/v[bold]x:smile:")
    console.print(table)
    for is_terminal in (False, True):
        with ProgressBar("exp[lr=0.1][/b]\x1b]0;x", 3, "clips", console=Console(file=file, force_terminal=is_terminal)):
            pass
        assert r"exp[lr=0.1][/b]\x1b]0;x" in file.getvalue()
    for text in ("x[/b]/v[bold]x:smile:", "t[/b]", "c[bold]", "h[/x]", r"r[red]\x1b[2K", r"exp[lr=0.1][/b]\x1b]0;x"):
        assert text in file.getvalue()


def test_streams_are_escaped_and_given_back(capsys):
    before = sys.stdout, sys.stderr
    with escaped_output():
        print("a\tb\nc\x1b[31m\ud800")
        print("d\u2066e", file=sys.stderr)
        assert sys.stdout.isatty() is before[0].isatty()
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("a\tb\nc\\x1b[31m\\ud800\n", "d\\u2066e\n")


def test_ordinary_text_stays_as_it_is():
    for text in ("Ünïcödé", "日本語.mp4", "عربي", "👩‍🚀", "tab\tend\n"):  # writing systems are the point
        assert visible(text) == text
    assert as_line("a\nb") == "a\\nb"
    assert Path(visible("plain.mp4")) == Path("plain.mp4")


class Clock:
    """Stands in for the clock: it goes on when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(printing.time, "monotonic", lambda: self.now)


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


@pytest.mark.parametrize("on", [True, False])
def test_a_quiet_command_shows_no_progress(
    on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with quiet(on), ProgressBar("pretrain", 4, "steps") as bar:
        Console(stderr=True).print("of the way")
        Console(stderr=True, quiet=False).print("an error")
        clock.now += 20
        bar.advance(4)
    error = capsys.readouterr().err
    assert ("pretrain" in error, "of the way" in error, "an error" in error) == (not on, not on, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_quiet_command_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with quiet(True), ProgressBar("pretrain", 4, "steps") as bar:
        bar.advance(4)
    assert sys.stderr.getvalue() == ""


def test_the_bar_of_a_command_moves_in_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own sequences reach the terminal, those that others print meanwhile do not."""
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    monkeypatch.setattr(sys, "stderr", file)
    with lenient_stderr(), escaped_output(), ProgressBar("pretrain", 4, "steps") as bar:
        bar.advance()
        bar.show("loss 0.5")
        print("said\x1b]0;owned\x07", file=sys.stderr)
    shown = file.getvalue()
    assert "said" in shown
    assert "\x1b[" in shown
    assert "\\x1b" not in shown
    assert "\x1b]" not in shown
