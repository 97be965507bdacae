"""TensorBoard events, also on a disk that is full for a while, and what wandb is told of them."""

from __future__ import annotations

import resource
import signal
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_config

from avppc.train.events import EventLog
from avppc.train.log import read_metrics
from avppc.train.loop import pretrain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer


def events_of(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path)).Reload()


def steps_of(path: Path) -> list[int]:
    return [event.step for event in events_of(path).Scalars("loss")]


def test_only_what_did_not_fit_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files stands for the full disk; the file that has met it ends in half an event."""
    log = EventLog(tmp_path, 0)
    log.write({"step": 1, "loss": 1.0, "learning_rate": 0.1, "task_loss": [1.0]})
    (first,) = tmp_path.iterdir()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (first.stat().st_size + 10, limits[1]))
    try:
        log.write({"step": 2, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    for step in (3, 4):
        log.write({"step": step, "loss": 1 / step})
    log.close()
    assert caplog.messages == [f"TensorBoard events could not be written to {tmp_path}: [Errno 27] File too large"]
    (second,) = set(tmp_path.iterdir()) - {first}
    assert (steps_of(first), steps_of(second)) == ([1], [3, 4])


def test_accuracies_by_groups_and_skipped_steps_are_drawn(tiny_set: Path, tmp_path: Path) -> None:
    pretrain(tiny_config(tiny_set, tmp_path / "run", steps=3))
    accumulator = events_of(tmp_path / "run" / "tensorboard")
    tags = accumulator.Tags()["scalars"]
    assert {"loss", "learning_rate", "skipped", "accuracy/1to1", "accuracy/2to2"} <= set(tags)
    assert "step" not in tags
    (shown,) = accumulator.Scalars("accuracy/1to1")
    (row,) = read_metrics(tmp_path / "run")
    assert shown.value == pytest.approx(sum(row["task_accuracy"][:12]) / 12)


class StandIn(types.ModuleType):
    """As much of wandb as a run calls: it notes what happens, and watches TensorBoard's writer as wandb does."""

    def __init__(self, problem: str = "") -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.problem = problem
        self.tensorboard = types.SimpleNamespace(patch=self.patch, unpatch=self.unpatch)
        self.original = event_file_writer.EventFileWriter

    def patch(self, *, root_logdir: str) -> None:
        assert event_file_writer.EventFileWriter is self.original
        calls = self.calls

        class Watched(self.original):  # type: ignore[misc, name-defined]
            def __init__(self, logdir: str) -> None:
                calls.append(("watch", {"logdir": logdir, "root_logdir": root_logdir}))
                super().__init__(logdir)

        event_file_writer.EventFileWriter = Watched

    def unpatch(self) -> None:
        event_file_writer.EventFileWriter = self.original

    def init(self, **arguments: Any) -> StandIn:
        if self.problem:
            raise RuntimeError(self.problem)
        self.calls.append(("init", arguments))
        return self

    def finish(self) -> None:
        self.calls.append(("finish", {}))


class TestWandb:
    def test_a_run_and_its_resumption_are_one_there(
        self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wandb = StandIn()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        config = tiny_config(tiny_set, tmp_path / "run", steps=3, logger="wandb")
        pretrain(config)
        pretrain(config)
        assert [name for name, _ in wandb.calls] == ["init", "watch", "finish"] * 2
        first, again = (arguments for name, arguments in wandb.calls if name == "init")
        assert first == again
        assert (first["project"], first["name"], first["resume"]) == ("avppc", "run", "allow")
        assert first["config"]["encoder"]["width"] == 4
        folder = str(tmp_path / "run" / "tensorboard")
        assert wandb.calls[1][1] == {"logdir": folder, "root_logdir": folder}
        assert event_file_writer.EventFileWriter is wandb.original
        assert steps_of(Path(folder)) == [3]

    def test_without_the_package(self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match=r"needs the package wandb .*: pip install 'avppc\[wandb\]'"):
            pretrain(tiny_config(tiny_set, tmp_path / "run", logger="wandb"))
        assert not (tmp_path / "run").exists()

    def test_what_it_refuses_is_told(self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb = StandIn("no key\nis there")
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        with pytest.raises(OSError, match=r"wandb does not start: no key \(WANDB_MODE=offline"):
            pretrain(tiny_config(tiny_set, tmp_path / "run", logger="wandb"))
        assert event_file_writer.EventFileWriter is wandb.original
        pretrain(tiny_config(tiny_set, tmp_path / "run", steps=12))  # without it the same run goes on
