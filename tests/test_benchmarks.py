"""What of benchmarks/ can be tried without a GPU or a clock: modules import, contestants agree, gpu.sh goes on."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avppc import log_mel

ROOT = Path(__file__).parents[1]
PARTS = ["build", "tests", "bench_steps", "bench_features", "sanitizer", "bench_peers", "data", "bench_train"]
PARTS += ["bench_loader", "table", "plots"]


def test_every_benchmark_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in sorted((ROOT / "benchmarks").glob("test_*.py")):
        assert f"benchmarks/{path.name}::" in done.stdout


@pytest.mark.parametrize("peer", ["torch_stft", "torch_stft_whisper"])
def test_the_features_of_the_gpu_contestants_agree(monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from log_mel_peers import GPU_PEERS

    config, make = GPU_PEERS[peer]
    waveform = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(make("cpu")(waveform), log_mel(waveform, config), atol=1e-3, rtol=0)


class FakeMachine:
    """A copy of gpu.sh beside a Python that has a GPU, writes down how it is called, and fails where it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.failing = folder, folder / "calls", folder / "failing"
        (folder / "benchmarks").mkdir()
        shutil.copy(ROOT / "benchmarks" / "gpu.sh", folder / "benchmarks")
        self.failing.write_text("none\n")
        self.python = self._program(
            "python",
            'case $1 in -c) echo "Test GPU"; exit ;; esac\n'
            f'echo "$*" >>"{self.calls}"\n'
            f'! grep -q -f "{self.failing}" <<<"$*"\n',
        )
        self._program("compute-sanitizer", 'while [ "$1" != -m ]; do shift; done; "$PYTHON" "$@"\n')

    def _program(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": str(self.python)}
        environment.pop("PARTS", None)
        return subprocess.run(
            ["bash", str(self.folder / "benchmarks" / "gpu.sh")],
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def parts(self, output: str) -> list[str]:
        """The parts that were begun."""
        lines = [line.removeprefix("== ").split(" (")[0] for line in output.splitlines() if " (at most " in line]
        return lines


def test_gpu_script_runs_every_part_once(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    first = machine.run()
    assert first.returncode == 0, first.stderr
    assert machine.parts(first.stdout) == PARTS
    calls = machine.calls.read_text()
    for part in ("pip install", "test_info_nce_triton_gpu", "full_step", "log_mel_cuda", "avppc synth", "bench-train",
                 "--compile", "avppc table", "plot.py"):  # fmt: skip
        assert part in calls
    same = "batch_size=256;encoder.channels=motion"
    assert f"av-permutative:{same} synchronization:rivals.sync_mode=multiway;{same}" in calls
    assert machine.parts(machine.run().stdout) == ["plots"]  # which is drawn anew each time


def test_gpu_script_goes_on_behind_a_failed_part_and_repeats_it(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.failing.write_text("log_mel_cuda.json\navppc table\n")
    first = machine.run()
    assert first.returncode == 1
    assert machine.parts(first.stdout) == PARTS
    assert "make gpu: failed: bench_features table; the same command tries these again" in first.stderr
    machine.failing.write_text("none\n")
    assert machine.parts(machine.run().stdout) == ["bench_features", "table", "plots"]


def test_gpu_script_runs_the_parts_asked_for_alone(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    assert machine.parts(machine.run(PARTS="data table").stdout) == ["data", "table"]


def test_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.python.write_text("#!/usr/bin/env bash\nexit 1\n")
    done = machine.run()
    assert (done.returncode, done.stderr) == (1, "make gpu: torch finds no CUDA device\n")
