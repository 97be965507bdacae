"""How a worker process of ours begins, whatever it works on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Leaves Ctrl-C to the process that started this one, and from now on ends with it, even in the middle of work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it and ends its processes itself
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # None: nobody started this process as a worker
        parent.join()
        os._exit(1)
