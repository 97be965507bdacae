"""What of benchmarks/ can be tried without a GPU or a clock: modules import, contestants agree, gpu.sh goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from avppc import log_mel

ROOT = Path(__file__).parents[1]
PARTS = ["build", "tests", "bench_steps", "bench_features", "sanitizer", "bench_peers", "bench_compiled", "data"]
PARTS += ["bench_train", "bench_loader", "table", "plots"]


def test_every_benchmark_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "benchmarks"]
    # by its environment pytest-benchmark takes it for a worker of pytest-xdist, and warns in the first of them
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
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


class FakeDevice:
    """torch.cuda as gpu_timing.as_graph sees it, with 1000 free bytes; a function takes so many, and may wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self.peak, self.captured = 0, 0, 0
        for name, value in {
            "memory_allocated": lambda: 50,
            "max_memory_allocated": lambda: 50 + self.peak,
            "reset_peak_memory_stats": lambda: None,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "mem_get_info": lambda: (1000, 2000),
            "empty_cache": lambda: None,
            "current_stream": lambda: None,
            "stream": lambda _: contextlib.nullcontext(),
            "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: "replayed"),
            "graph": self._capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def _capture(self, graph: object) -> Iterator[None]:
        self.captured += 1
        yield

    def step(self, takes: int, waits: bool) -> None:
        """What is to be captured."""
        self.peak = takes
        if waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.mark.parametrize(("takes", "waits", "captured"), [(900, False, 1), (950, False, 0), (100, True, 0)])
def test_only_what_can_be_captured_is(monkeypatch: pytest.MonkeyPatch, takes: int, waits: bool, captured: int) -> None:
    """A capture that fails would spoil all that is measured after it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_timing import as_graph

    device = FakeDevice(monkeypatch)
    replay = as_graph(lambda: device.step(takes, waits))
    assert (device.captured, device.mode) == (captured, 0)
    assert (replay is not None) == (captured == 1)
    assert replay is None or replay() == "replayed"


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_timing import as_graph

    device = FakeDevice(monkeypatch)
    entered: list[str] = []

    @contextlib.contextmanager
    def stream(_: object) -> Iterator[None]:
        entered.append("stream")
        try:
            yield
        finally:
            entered.append("left")

    @contextlib.contextmanager
    def graph(_: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert as_graph(lambda: device.step(100, False)) is None
    assert entered == ["stream", "left"]


def test_plots_of_a_copy_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from plot import caption

    machine = {"gpu": "Test GPU", "versions": {"torch": "2.11.0"}, "date": "2026-01-01", "uncommitted_changes": False}
    assert caption({**machine, "commit": None}).endswith("2026-01-01, commit unknown")
    assert caption({**machine, "commit": "0123456789"}).endswith("2026-01-01, 0123456")
