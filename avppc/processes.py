"""Processes: how a worker begins, what one file may cost it, how a signal ends a command, how many cores there are.

The signals are SIGTERM, which clusters send before they take a machine away, and Ctrl-C, SIGINT.

Decoders believe what a file says of itself. Beyond what is checked before, the system stops them: an allocation over
the limit fails, which refuses the file, and a process that computes for too long is ended, which its parent notices.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import FrameType
from typing import Any

FILE_MEMORY_BYTES = 4 << 30
"""Memory that a file may take. The largest pictures that are read, 33 Mpixel of 16 bits, take 100 MiB each, and a
decoder keeps up to 17 of them; the rest is for the clips and for what finds the mouth."""
_resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # not on Windows


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Holds a Ctrl-C (SIGINT) back until the block ends.

    A process that is started inside inherits this: no Ctrl-C ends it while it imports its modules, before it calls
    `follow_parent`.
    """
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


def process_pool(
    workers: int, context: SpawnContext | ForkServerContext, start: Callable[..., None], *arguments: Any
) -> ProcessPoolExecutor:
    """Worker processes that call functions; all of them are started by the first call.

    Left to itself a pool starts the next process when a call finds none idle. Where another one dies just then, its
    thread closes the pipes that the new one is to inherit: an error about file descriptors, instead of
    BrokenProcessPool, or a process with the wrong pipes (before Python 3.12).

    Args:
        start: called with the arguments in each process, before its first call.
    """
    pool = ProcessPoolExecutor(workers, context, start, arguments)
    pool._safe_to_dynamically_spawn_children = False  # type: ignore[attr-defined]  # as the pool itself does for forks
    return pool


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
    """The exit code by which shells report that this signal ended a program: 130 for SIGINT, 143 for SIGTERM."""
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


def limit_memory(more_bytes: int = FILE_MEMORY_BYTES) -> None:
    """Lets this process allocate at most so much more memory than it has now, where the system can enforce it."""
    with contextlib.suppress(OSError, ValueError):  # a lower limit is set from outside
        used = _data_bytes()
        if used is not None:
            _set_soft("RLIMIT_DATA", used + more_bytes)


def limit_seconds(more: float | None) -> None:
    """Ends this process (SIGXCPU) after so many more seconds of processor time; None: never."""
    with contextlib.suppress(OSError, ValueError):
        _set_soft("RLIMIT_CPU", None if more is None else math.ceil(time.process_time() + more))


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Limits this process's memory while the block lasts."""
    before = None if _resource is None else _resource.getrlimit(_resource.RLIMIT_DATA)
    limit_memory()
    try:
        yield
    finally:
        if before is not None:
            _resource.setrlimit(_resource.RLIMIT_DATA, before)


def _set_soft(name: str, value: int | None) -> None:
    if _resource is None:
        return
    kind = getattr(_resource, name)
    hard = _resource.getrlimit(kind)[1]
    if value is None or (hard != _resource.RLIM_INFINITY and value > hard):
        value = hard
    _resource.setrlimit(kind, (value, hard))


def _data_bytes() -> int | None:
    """Private memory of this process, as RLIMIT_DATA counts it; None where the system does not tell (not Linux)."""
    try:
        found = re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def is_held_up(pid: int) -> bool:
    """Whether a process is stopped, or computes (then `limit_seconds` counts); False where the system does not tell."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t", "R")
