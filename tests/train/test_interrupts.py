"""Runs that signals end, or the end of another of their processes; and what their logs hold after they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config

from avppc.cli import main
from avppc.processes import Stopped
from avppc.train import loop
from avppc.train.events import EventLog
from avppc.train.log import MetricsLog, read_metrics
from avppc.train.loop import pretrain

TESTS = Path(__file__).parent


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def send_in_step(step: int, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run send itself signals."""
    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def clip_and_signal(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        for number in numbers if calls == step else ():
            signal.raise_signal(number)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)


class TestControlC:
    def test_the_first_saves_and_leaves_with_130(
        self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        before = signal.getsignal(signal.SIGINT)
        send_in_step(3, [signal.SIGINT], monkeypatch)
        assert loop.execute(tiny_config(tiny_set, tmp_path / "run", checkpoint_every=100)) == 130
        assert checkpoints(tmp_path / "run") == ["step_00000003"]
        assert signal.getsignal(signal.SIGINT) is before
        error = capfd.readouterr().err
        assert "avppc: stopping after this step, which is going to be saved; Ctrl-C once more" in error
        assert "stopped by SIGINT after step 3, which is saved in" in error

    @pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
    def test_the_second_ends_at_once(
        self, first: int, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        send_in_step(3, [first, signal.SIGINT], monkeypatch)
        config = tiny_config(tiny_set, tmp_path / "run")
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from step_00000002"):
            loop.execute(config)
        assert checkpoints(config.out) == ["step_00000002"]

    def test_before_the_first_step_nothing_is_there(
        self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(loop, "_restore", lambda *args: signal.raise_signal(signal.SIGINT))
        flags = ["--data", str(tiny_set), "--out", str(tmp_path / "run"), "--batch-size", "8", "--device", "cpu"]
        assert main(["pretrain", *flags]) == 130
        error = capsys.readouterr().err
        assert (
            error == "avppc: interrupted; no checkpoint was written yet: the same command starts from the beginning\n"
        )


def test_a_table_that_pretrains_is_stopped_in_a_line(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: object) -> None:
        raise Stopped("stopped by SIGTERM after step 3", signal.SIGTERM)

    monkeypatch.setattr("avppc.evaluate.table.table.pretrain", stop)
    flags = ["--data", str(tiny_set), "--out", str(tmp_path / "table"), "--tasks", "time-arrow:batch_size=8"]
    assert main(["table", *flags, "--device", "cpu"]) == 143
    assert "stopped by SIGTERM after step 3; the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["start", "joined"])
def test_the_end_of_one_process_is_told_by_the_other(moment: str, tiny_set: Path, tmp_path: Path) -> None:
    """torchrun ends it with SIGTERM, unless it has noticed by itself."""
    (tmp_path / "rank.py").write_text(
        "import os, signal, sys, time\n"
        "from avppc.cli import main\n"
        "from avppc.train import loop, distributed as processes\n"
        "begun, connect = os.path.abspath(__file__) + '.begun', processes._connect\n"
        "def begin(device):\n"
        "    open(begun, 'w').close()\n"
        "    connect(device)\n"
        "def die(*args):\n"
        "    while not os.path.exists(begun): time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ['RANK'] == '0': processes._connect = begin\n"
        f"else: {'die()' if moment == 'start' else 'loop._open_task = die'}\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments += ["--monitor-interval=0.05", str(tmp_path / "rank.py"), "pretrain", "--data", str(tiny_set)]
    arguments += ["--out", str(tmp_path / "run"), "--batch-size", "8", "--device", "cpu", "--threads", "1"]
    changes = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(TESTS.parents[1])}
    done = subprocess.run(arguments, env={**os.environ, **changes}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "[rank0]: Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("avppc: ")]
    assert lines
    assert all("SIGTERM" in line or "another process of this run has ended" in line for line in lines)


class TestEvents:
    """What TensorBoard shows of a run that went on."""

    def steps(self, directory: Path) -> list[int]:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(directory))
        events.Reload()
        return [event.step for event in events.Scalars("loss")]

    def log(self, directory: Path, first_step: int, steps: range) -> None:
        log = EventLog(directory, first_step)
        for step in steps:
            log.write({"step": step, "loss": 2.0, "task_loss": [1.0]})
        log.close()

    def test_the_step_from_which_it_goes_on_stays(self, tmp_path: Path) -> None:
        self.log(tmp_path, 0, range(1, 6))
        self.log(tmp_path, 3, range(4, 7))  # killed after 5, whose checkpoint is that of 3
        assert self.steps(tmp_path) == [1, 2, 3, 4, 5, 6]

    def test_a_finished_run_leaves_no_more_files(self, tiny_set: Path, tmp_path: Path) -> None:
        for _ in range(2):
            pretrain(tiny_config(tiny_set, tmp_path / "run", steps=4, log_every=2))
        assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
        assert self.steps(tmp_path / "run" / "tensorboard") == [2, 4]

    def test_events_that_cannot_be_written_end_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        log = MetricsLog(tmp_path, 0)
        (tmp_path / "tensorboard").write_text("no folder")
        for step in (1, 2):
            log.write({"step": step, "loss": 2.0})
        (tmp_path / "tensorboard").unlink()
        log.write({"step": 3, "loss": 2.0})
        log.close()
        assert caplog.text.count("TensorBoard events could not be written") == 1
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
        assert self.steps(tmp_path / "tensorboard") == [3]
