"""TensorBoard events of a run, and the same at wandb.

TensorBoard's own writers write in a thread, which a full disk ends with a traceback; here the caller gets the error.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from avppc.printing import one_line
from avppc.settings import read_checked_json, write_checked_json

logger = logging.getLogger(__name__)

EVENTS_FOLDER = "tensorboard"
WANDB_FILE = "wandb.json"
_SESSION_START = 1  # TensorBoard's SessionLog.START: it drops what it has of that step and later ones
_numbers = itertools.count()


class EventLog:
    """TensorBoard's event files: one is begun with the first metrics, and another one after a write that failed.

    Metrics that cannot be written are missing there; a warning says so once.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        """Steps after first_step are taken again: TensorBoard is told to drop what earlier files have of them."""
        self._directory = directory
        self._first_step = first_step
        self._file: IO[bytes] | None = None
        self._warned = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row of metrics, which has its "step"."""
        numbers = {name: value for name, value in row.items() if isinstance(value, float | int) and name != "step"}
        try:
            if self._file is None:
                self._begin()
            self._add(step=row["step"], summary={"value": [_value(*number) for number in numbers.items()]})
        except OSError as error:
            self._warn(error)
            self.close()  # nothing can be read behind half an event

    def close(self) -> None:
        """Closes the file; the next metrics begin another one."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning("TensorBoard events could not be written to %s: %s", self._directory, error)
        self._warned = True

    def _begin(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = (self._directory / name).open("xb", buffering=0)
        self._add(file_version="brain.Event:2")
        if self._first_step:
            self._add(step=self._first_step + 1, session_log={"status": _SESSION_START})

    def _add(self, **content: Any) -> None:
        assert self._file is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorBoard's own imports warn of their dependencies
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
        rest = record.getbuffer()
        while rest:
            rest = rest[self._file.write(rest) :]


def _value(name: str, number: float) -> dict[str, Any]:
    return {"tag": name, "simple_value": number}


def require_wandb() -> Any:
    """The package wandb; ImportError, naming the extra to install, where it is missing."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError(
            f"--logger wandb needs the package wandb ({error}): pip install 'avppc[wandb]', or leave --logger out"
        ) from error


@contextlib.contextmanager
def wandb_sync(run: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, wandb shows a run's settings and, by its TensorBoard sync, what EventLog writes.

    A run that is resumed goes on under its id at wandb, which RUN/wandb.json keeps. The project is "avppc" unless the
    variable WANDB_PROJECT names another; all of wandb's own variables hold, such as WANDB_MODE=offline.

    Raises:
        ImportError: the package is missing.
        OSError: wandb does not start: it knows no key, say.
    """
    wandb, file = require_wandb(), run / WANDB_FILE
    if not file.exists():
        write_checked_json(file, {"id": uuid.uuid4().hex[:8]})
    folder = run / EVENTS_FOLDER
    folder.mkdir(exist_ok=True)
    wandb.tensorboard.patch(root_logdir=str(folder))
    try:
        session = _start(wandb, run, read_checked_json(file)["id"], settings)
        try:
            _tell_of(folder)
            yield
        finally:
            session.finish()
    finally:
        wandb.tensorboard.unpatch()


def _start(wandb: Any, run: Path, run_id: str, settings: Mapping[str, Any]) -> Any:
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "avppc"),
            id=run_id,
            resume="allow",
            name=run.resolve().name,
            dir=str(run),
            config=dict(settings),
            settings={"console": "off"},  # the progress bar is none of its business
        )
    except Exception as error:  # it has many of its own
        raise OSError(f"wandb does not start: {one_line(error)} (WANDB_MODE=offline needs no account)") from error


def _tell_of(folder: Path) -> None:
    """Names the folder of events: wandb sees it where TensorBoard's own writer is made, and reads what is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own imports warn of their dependencies
        from tensorboard.summary.writer import event_file_writer
    event_file_writer.EventFileWriter(str(folder)).close()
