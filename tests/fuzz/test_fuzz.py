"""Some hundred damaged and hostile files for every reader; `make fuzz` goes on for ten minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 100


def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """In a process of its own, which may crash, hang or run out of the little memory that it has."""
    command = [sys.executable, Path(__file__).with_name("run.py"), "--count", str(COUNT), "--findings", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = dict(line.split(": ", 1) for line in result.stdout.splitlines() if "{" in line)
    assert len(counts) == 16
    assert result.stdout.splitlines()[-1] == f"{16 * COUNT} files, 0 kinds of findings"
    # Most readers refuse most damage; journals leave it out.
    assert all("refused" in text for name, text in counts.items() if name not in ("records", "metrics"))


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("raise ZeroDivisionError('x')", "ZeroDivisionError: x"),
        ("raise ValueError('no')", "names no file: no"),
        ("raise OSError('no')", "names no file: no"),
        ("raise UnicodeError('/a')", "UnicodeError of the insides"),
        ("bytearray(1 << 34)", "MemoryError"),
        ("while True: pass", "hangs for 1 s"),
    ],
)
def test_the_fuzzer_notices_what_no_reader_may_do(outcome: str, reason: str, tmp_path: Path) -> None:
    program = (
        f"import signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import run\n"
        "run.MOST_SECONDS = 1\n"
        "signal.signal(signal.SIGPROF, run.raise_hang)\n"
        "run.limit_memory(64)\n"
        "class Reader:\n"
        "    whole, mutate = b'', staticmethod(lambda content, rng: content)\n"
        f"    def read(self, content):\n        {outcome}\n"
        "import pathlib\n"
        f"sys.exit(run.fuzz({{'reader': Reader()}}, 60, 1, 0, pathlib.Path({str(tmp_path)!r})))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1, result.stderr
    assert reason in result.stdout
    assert (tmp_path / "reader-0").exists()
