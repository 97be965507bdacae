"""A run's figures as TensorBoard events.

TensorBoard's own writers write in a thread, which a full disk ends with a traceback, and all later figures with it.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)
_START = 1  # of a session: TensorBoard drops what it has of this step and later ones
_numbers = itertools.count()


class EventLog:
    """Event files in a directory: one is made with the first figures, and a new one after an error.

    What cannot be written is missing; the log says so once.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        """What earlier files say of steps after first_step does not count any more: they are made again."""
        self._directory = directory
        self._first_step = first_step
        self._file: IO[bytes] | None = None
        self._told = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row of metrics, which has its "step"."""
        figures = {name: value for name, value in row.items() if isinstance(value, float)}
        try:
            if self._file is None:
                self._begin()
            self._add(step=row["step"], summary={"value": [_value(*figure) for figure in figures.items()]})
        except OSError as error:
            self._tell(error)
            self.close()  # nothing can be read behind half an event

    def close(self) -> None:
        """Closes the file; the next figures begin another one."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            logger.warning("TensorBoard events could not be written to %s: %s", self._directory, error)
        self._told = True

    def _begin(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = (self._directory / name).open("xb", buffering=0)
        self._add(file_version="brain.Event:2")
        if self._first_step:
            self._add(step=self._first_step + 1, session_log={"status": _START})

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


def _value(name: str, figure: float) -> dict[str, Any]:
    return {"tag": name, "simple_value": figure}
