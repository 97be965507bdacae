"""A process of prepare whose decoder crashes on some videos and hangs on others, by their names."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from avppc.data import prepare_worker

_real_work = prepare_worker._work
_real_decode_clips = prepare_worker.decode_clips


def work(connection, config) -> None:
    prepare_worker.decode_clips = _decode_clips
    _real_work(connection, config)


def _decode_clips(source, **options):
    name = Path(source).name
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "once" in name and not Path(source).with_suffix(".seen").exists():
        Path(source).with_suffix(".seen").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in name:
        time.sleep(600)
    return _real_decode_clips(source, **options)
