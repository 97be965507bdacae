"""Pools of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

import pytest

from avppc.processes import process_pool


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_dies_while_the_next_one_starts_breaks_the_pool(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: the pool's thread had closed pipes that were just handed on, an error about descriptors."""
    context = multiprocessing.get_context(method)
    start, started = context.Process.start, []
    pool = process_pool(2, context, bool)

    def kill_and_start(process: BaseProcess) -> None:
        if len(started) == 1:
            started[0].kill()
            while pool._executor_manager_thread is not None and not pool._call_queue._reader.closed:
                time.sleep(0.01)  # until that thread has seen it, if it runs already
        start(process)
        started.append(process)

    monkeypatch.setattr(context.Process, "start", kill_and_start)

    def submit_until_it_breaks() -> None:
        for _ in range(2):
            pool.submit(os.getpid)
        for _ in range(1000):
            pool.submit(os.getpid).result()

    with pool, pytest.raises(BrokenProcessPool):
        submit_until_it_breaks()
    assert len(started) == 2
