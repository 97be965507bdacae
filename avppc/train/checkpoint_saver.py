"""Checkpoints, written by a thread while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avppc.train.checkpoint import CheckpointStore

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Copies the tensors, then lets a thread write them; a checkpoint waits for the one before it.

    If one cannot be written (a full disk), the log says so and the older ones stay; only `finish` raises.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> None:
        """Returns as soon as the tensors are copied."""
        self._join()
        copies = {name: {key: _copy(value) for key, value in group.items()} for name, group in tensors.items()}
        # Not a daemon: a process that ends by an exception still finishes its file.
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(progress)), name="avppc-saver")
        self._thread.start()

    def finish(self) -> None:
        """Waits for the last checkpoint; OSError if it could not be written."""
        self._join()
        if self._error is not None:
            raise OSError(f"the last checkpoint is missing: {self._error}") from self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> None:
        self._error = None
        try:
            self._store.save(step, tensors, progress)
        except Exception as error:  # whatever it is, training goes on: the next checkpoint may be written
            self._error = error
            newest = self._store.newest_name()
            kept = f"{newest} is kept" if newest else "there is none yet"
            logger.warning("the checkpoint of step %d could not be written (%s); %s", step, error, kept)


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
