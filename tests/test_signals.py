"""Signals end a command with a line and the exit code that shells know; nothing that it only says ends its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from avppc.cli import COMMANDS, main
from avppc.printing import lenient_stderr
from avppc.processes import Stopped, ctrl_c_waits, end_at_once, sigterm_interrupts


@pytest.mark.parametrize(("number", "code", "how"), [(15, 143, "ended by SIGTERM"), (2, 130, "interrupted")])
@pytest.mark.parametrize(
    ("name", "advice"), [("table", "; the same command goes on from what is there"), ("diagnose", "")]
)
def test_a_signal_is_told_in_a_line(
    name: str,
    advice: str,
    number: int,
    code: int,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def execute(config: object) -> int:
        signal.raise_signal(number)
        time.sleep(60)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"{COMMANDS[name].module}.execute", execute)
    flags = (
        ["--run", str(tmp_path)] if name == "diagnose" else ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    assert main([name, *flags]) == code
    assert capsys.readouterr().err == f"avppc: {how}{advice}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    """Whatever the first one finds no end of."""
    program = (
        "import time\n"
        "from avppc.processes import sigterm_interrupts\n"
        "with sigterm_interrupts():\n"
        "    try:\n        print(flush=True); time.sleep(60)\n"
        "    finally:\n        print(flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
            process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM


def test_a_run_that_a_table_pretrains_is_stopped_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(config: object) -> int:
        raise Stopped("stopped by SIGTERM after step 3, which is saved in x", signal.SIGTERM)

    monkeypatch.setattr("avppc.evaluate.table.table.execute", execute)
    assert main(["table", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 143
    error = capsys.readouterr().err
    assert error == "avppc: stopped by SIGTERM after step 3, which is saved in x; the same command goes on from there\n"


def test_other_threads_leave_signals_alone() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with sigterm_interrupts(), end_at_once("it worked"):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_a_wait_in_a_library_is_ended() -> None:
    """A lock that is taken twice stands for it: no signal ends that wait, so that Python never runs its handler."""
    program = (
        "import ctypes\n"
        "from avppc.processes import end_at_once, sigterm_interrupts\n"
        "lock, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)\n"
        "with sigterm_interrupts(), end_at_once('it waited'):\n"
        "    library.pthread_mutex_lock(lock)\n"
        "    print(flush=True)\n"
        "    library.pthread_mutex_lock(lock)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == b"\navppc: ended by SIGTERM while it waited\n"
    assert process.returncode == 143


def test_processes_that_are_started_never_see_ctrl_c() -> None:
    """Nor while they import; here it waits until they are started."""
    program = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    seen, steps = [], []

    def start() -> None:
        with ctrl_c_waits():
            signal.raise_signal(signal.SIGINT)
            steps.append("started")
            seen.append(subprocess.check_output([sys.executable, "-c", program], text=True))
        steps.append("gone on")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert steps == ["started"]
    assert seen == ["True\n"]
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


class TestStandardError:
    def test_a_full_disk_below_it_ends_nothing(self, tmp_path: Path) -> None:
        program = (
            "import sys, logging, time, warnings\n"
            "from rich.console import Console\n"
            "import avppc.doctor\n"
            "from avppc.cli import main\n"
            "from avppc.printing import ProgressBar\n"
            "def execute(config):\n"
            "    Console(stderr=True).print('said')\n"
            "    logging.getLogger('avppc').warning('said')\n"
            "    warnings.warn('said')\n"
            "    with ProgressBar('bar', 2, 'clips') as progress:\n"
            "        progress.advance()\n"
            "    print('said' * 10_000, file=sys.stderr)\n"
            "    print('done')\n"
            "    return 0\n"
            "avppc.doctor.execute = execute\n"
            "sys.exit(main(['doctor']))\n"
        )
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, text=True)
        assert (done.stdout, done.returncode) == ("done\n", 0)

    def test_what_fits_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After what did not."""
        with (tmp_path / "log").open("w") as log:
            monkeypatch.setattr(sys, "stderr", log)
            with lenient_stderr():
                print("before", file=sys.stderr, flush=True)
                kept, full = os.dup(log.fileno()), os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, log.fileno())
                print("lost", file=sys.stderr, flush=True)
                os.dup2(kept, log.fileno())
                print("after", file=sys.stderr, flush=True)
                os.close(kept)
                os.close(full)
        assert (tmp_path / "log").read_text() == "before\nafter\n"

    def test_a_full_disk_below_standard_output_is_told(self) -> None:
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "avppc", "--version"]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.stderr == "avppc: standard output: [Errno 28] No space left on device\n"
        assert done.returncode == 2


class TestEnvironment:
    @pytest.mark.parametrize(
        ("name", "value", "line"),
        [
            ("AVPPC_CPU_LEVEL", "nonsense", "AVPPC_CPU_LEVEL must be baseline, avx2 or avx512; got 'nonsense'"),
            ("AVPPC_CPU_LEVEL", "AVX2", "AVPPC_CPU_LEVEL must be baseline, avx2 or avx512; got 'AVX2'"),
            ("AVPPC_TUNE", "yes", "AVPPC_TUNE must be 1 or 0, got 'yes'"),
        ],
    )
    def test_a_variable_is_refused_by_its_name(
        self, name: str, value: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(name, value)
        assert main(["doctor"]) == 2
        assert capsys.readouterr().err == f"avppc: {line}\n"
