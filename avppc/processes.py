"""How a worker process of ours begins, whatever it works on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Lets a Ctrl-C wait until the block ends. Processes that are started inside never see one, not even while they
    import what they need, before `follow_parent`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """Leaves Ctrl-C to the process that started this one, and from now on ends with it, even in the middle of work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it and ends its processes itself
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # None: nobody started this process as a worker
        parent.join()
        os._exit(1)
