"""TensorBoard events, as TensorBoard itself reads them."""

from __future__ import annotations

import errno
import resource
import signal
import warnings
from pathlib import Path

import pytest

from avppc.train.events import EventLog


def steps_of(folder: Path, name: str = "loss") -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return [event.step for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def test_a_resumed_run_keeps_the_step_that_it_resumes_from(tmp_path: Path) -> None:
    for first, steps in ((0, (2, 4, 6, 8)), (6, (8, 10))):
        log = EventLog(tmp_path, first)
        for step in steps:
            log.write(step, {"loss": 1 / step, "learning_rate": 0.1})
        log.close()
    assert steps_of(tmp_path) == [2, 4, 6, 8, 10]
    assert steps_of(tmp_path, "learning_rate") == [2, 4, 6, 8, 10]


def test_a_run_without_new_figures_leaves_no_file(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "tensorboard", 8)
    log.close()
    assert not (tmp_path / "tensorboard").exists()


def test_what_comes_after_a_full_disk_is_read(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; half an event stays in the file that it was met in."""
    log = EventLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    (file,) = tmp_path.iterdir()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{file}'") as caught:
            log.write(2, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    log.write(3, {"loss": 0.2})
    log.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert steps_of(tmp_path) in ([1, 3], [3])
