"""TensorBoard events on a disk that is full for a while."""

from __future__ import annotations

import resource
import signal
import warnings
from pathlib import Path

import pytest

from avppc.train.log import EventLog


def steps_of(path: Path) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(path)).Reload()
    return [event.step for event in events.Scalars("loss")]


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
