"""The command line: every command documents itself, and errors are one clear line."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import avppc.config
from avppc.cli import COMMANDS, _parse, main
from avppc.config import PretrainConfig


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_of_every_command_is_documented(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help-all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    config = getattr(avppc.config, COMMANDS[name].config)
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default_factory, type) or "Config" in str(field.type):
            assert f"{flag}." in text
            continue
        # --flag TYPE help... (default: or (required): the type is one word, or choices in braces
        described = re.search(rf"{flag}(?:,| (?=[A-Z{{[]))(.*?)\((?:default|required)", text)
        assert described is not None, f"{flag} is not there"
        assert len(described[1].split()) >= 5, f"{flag} has no help"


def test_usage_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and command.summary in text for name, command in COMMANDS.items())
    assert main(["help"]) == 0
    assert capsys.readouterr().out == text
    assert main([]) == 2
    for flag in ("--version", "-V"):
        assert main([flag]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["help", "doctor"])
    assert "usage: avppc doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "answer"),
    [("dance", "; the commands are synth, "), ("pretrian", "; did you mean 'pretrain'? The commands are synth, ")],
)
def test_unknown_command_is_named(name: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert f"there is no command {name!r}{answer}" in capsys.readouterr().err


def test_bad_files_are_one_line_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "[bold]nothing"  # brackets come out as they are
    assert main(["pretrain", "--data", str(data), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "[bold]nothing" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_presets_set_the_defaults() -> None:
    laptop, gpu = (PretrainConfig.from_preset(name, Path("data"), Path("out")) for name in ("laptop", "gpu"))
    assert laptop == PretrainConfig(Path("data"), Path("out"))
    assert (gpu.encoder.backbone, gpu.encoder.width, gpu.encoder.stem) == ("resnet34", 64, "2d")
    with pytest.raises(ValueError, match="preset must be one of 'laptop', 'gpu'; got 'phone'"):
        PretrainConfig.from_preset("phone", Path("data"), Path("out"))


@pytest.mark.parametrize("name", ["baselines", "rivals"])
@pytest.mark.parametrize("sync_mode", [["sync-mode", "multiway"], ["sync_mode=multiway"]], ids=" ".join)
def test_flags_are_read_under_former_names(name: str, sync_mode: list[str]) -> None:
    first, *rest = sync_mode
    flags = ["--data", "d", "--out", "rivals.d", f"--{name}.{first}", *rest]
    config = _parse("pretrain", COMMANDS["pretrain"], flags)
    assert (config.baselines.sync_mode, config.out) == ("multiway", Path("rivals.d"))


def test_preset_flag_reaches_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(sys.modules, "avppc.train.loop", type(sys)("avppc.train.loop"))
    monkeypatch.setattr(
        sys.modules["avppc.train.loop"], "execute", lambda config: seen.append(config) or 0, raising=False
    )
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(["pretrain", *flags, "--preset", "gpu", "--encoder.width", "32"]) == 0
    assert main(["pretrain", "--preset=laptop", *flags, "--steps", "7"]) == 0
    assert main(["pretrain", *flags, "--preset", "phone"]) == 2
    gpu, laptop = seen
    assert (gpu.preset, gpu.encoder.backbone, gpu.encoder.width) == ("gpu", "resnet34", 32)
    assert (laptop.preset, laptop.encoder.backbone, laptop.steps) == ("laptop", "conv4", 7)


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["--version"], ["pretrain", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_ends_it_quietly(arguments: list[str], unbuffered: str) -> None:
    """As behind `| head`: whether a write finds the pipe closed, or the last flush does."""
    command, environment = [sys.executable, "-m", "avppc", *arguments], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory."),
    ],
)
def test_too_little_memory_is_told_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(config: object) -> int:
        raise error

    monkeypatch.setattr("avppc.doctor.execute", execute)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("avppc: out of memory: ")
    monkeypatch.setattr("avppc.doctor.execute", lambda config: [].pop())  # what nobody foresaw keeps its traceback
    with pytest.raises(IndexError):
        main(["doctor"])


@pytest.mark.parametrize(
    ("name", "advice"), [("doctor", ""), ("prepare", "; the same command goes on from what is there")]
)
def test_an_interruption_is_told_and_what_goes_on(
    name: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(config: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{COMMANDS[name].module}.execute", execute)
    flags = [] if name == "doctor" else ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([name, *flags]) == 130
    assert capsys.readouterr().err == f"avppc: interrupted{advice}\n"


def test_more_threads_than_a_process_can_have_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--threads", "100000"]
    assert main(["pretrain", *flags]) == 2
    assert capsys.readouterr().err == "avppc: threads must be from 0 to 4096, got 100000\n"


def test_a_broken_pipe_that_is_not_standard_output_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(config: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("avppc.doctor.execute", execute)
    assert main(["doctor"]) == 2
    assert "avppc: [Errno 32] Broken pipe" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="this system has no such signal")
def test_a_fault_of_memory_says_where_the_process_was() -> None:
    code = "import os, signal; from avppc import cli; cli._tell_of_crashes(); os.kill(os.getpid(), signal.SIGBUS)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGBUS
    assert "Bus error" in ended.stderr
