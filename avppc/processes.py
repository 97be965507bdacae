"""Processes of ours: how a worker begins, how a signal ends a command, and how many cores there are to share.

The signals are SIGTERM, which clusters send before they take a machine away, and Ctrl-C, SIGINT.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, SpawnContext
from types import FrameType


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


def process_context(module: str) -> SpawnContext | ForkServerContext:
    """How to start worker processes: not as forks of this one, whose threads decoders and torch do not survive.

    Args:
        module: what the workers run; it is imported once for all of them, where the system can share it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def follow_parent() -> None:
    """Called once in a worker process: from now on it ignores Ctrl-C, and ends as soon as its parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it and ends its processes itself
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # None: nobody started this process as a worker
        parent.join()
        os._exit(1)


def count_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_code(number: int) -> int:
    """What a shell reports of a program that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


class Stopped(Exception):
    """A signal ended a run whose checkpoint is written; the text says at which step."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code(number)


class Terminated(KeyboardInterrupt):
    """SIGTERM came. It is raised where Ctrl-C would raise KeyboardInterrupt, so that whatever ends, ends alike."""


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes the first SIGTERM raise Terminated inside; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def tell(text: str) -> None:
    """Writes a line to standard error from where nothing else may be used: a signal's handler, a process that ends."""
    with contextlib.suppress(OSError):
        os.write(2, f"\navppc: {text}\n".encode())


@contextlib.contextmanager
def end_at_once(meanwhile: str) -> Iterator[None]:
    """Lets SIGTERM and SIGINT end the process with a line, even while it waits in a library for other processes.

    Python's own handlers would only run after that wait.

    Args:
        meanwhile: what the process does, for the line.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_on_signal, args=(reader, meanwhile), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        thread.join()
        os.close(reader)


def _end_on_signal(reader: int, meanwhile: str) -> None:
    while numbers := os.read(reader, 1):
        number = numbers[0]
        if number in (signal.SIGTERM, signal.SIGINT):
            tell(f"ended by {signal.Signals(number).name} while {meanwhile}")
            os._exit(exit_code(number))
