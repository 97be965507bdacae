"""train.log: plain lines, one below the other through all calls of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from avppc.cli import main
from avppc.files import LineFile
from avppc.train.log import TextLog
from avppc.train.loop import pretrain

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S[^\r]*\n")


def test_a_run_says_how_it_goes(tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tiny_set, tmp_path / "run", steps=6)
    pretrain(config)
    content = (config.out / "train.log").read_bytes().decode()
    lines = content.splitlines(keepends=True)
    assert all(LINE.fullmatch(line) for line in lines)
    begin, *steps, end = [line[21:-1] for line in lines]
    assert begin.startswith(f"{config.out} begins: av-permutative, 6 steps of 8 of 24 clips (2.0 epochs), ")
    assert begin.endswith(" parameters, cpu, bf16")
    assert [line.split("  ")[0] for line in steps] == ["step 3 of 6", "step 6 of 6"]
    assert all(re.search(r"  loss \d\.\d{3}  \d+ clips/s  .*  rate \d\.\d\de-0\d$", line) for line in steps)
    assert end == f"encoder written to {config.out}/encoder.safetensors"
    assert begin in capsys.readouterr().err
    pretrain(config)
    after = (config.out / "train.log").read_text()
    assert after.startswith(content)
    assert " is finished already: " in after.removeprefix(content)


def test_quiet_keeps_the_file(tiny_set: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["pretrain", str(tiny_set), "--out", str(tmp_path / "run"), "--steps", "1", "--batch-size", "8"]
    flags += ["--encoder.width", "4", "--device", "cpu", "--threads", "1", "--objective.dim", "16", "--quiet"]
    assert main(flags) == 0
    assert capfd.readouterr() == ("", "")
    assert "step 1 of 1" in (tmp_path / "run" / "train.log").read_text()


def test_the_error_that_ends_a_run_is_its_last_line(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: object) -> None:
        raise FloatingPointError("it diverged\nand more")

    monkeypatch.setattr("avppc.train.loop._check_skipped", diverge)
    with pytest.raises(FloatingPointError):
        pretrain(tiny_config(tiny_set, tmp_path))
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith("  it diverged")


def test_no_line_is_torn(tmp_path: Path) -> None:
    log = TextLog(tmp_path)
    log.write("one\rtwo\nthree")
    log.close()
    with (tmp_path / "train.log").open("a") as file:
        file.write("2026-12-01 12:00:00  step 3 o")  # a kill
    log = TextLog(tmp_path)
    log.write("four")
    log.close()
    lines = (tmp_path / "train.log").read_bytes().decode().splitlines(keepends=True)
    assert all(LINE.fullmatch(line) for line in lines)
    assert [line[21:-1] for line in lines] == [r"one\rtwo\nthree", "four"]


def test_a_full_disk_is_told_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = TextLog(tmp_path)
    log._file.close()
    log._file = LineFile(Path("/dev/full"))
    log.write("step 1")
    log.close()
    assert "train.log: [Errno 28] No space left on device" in caplog.text
