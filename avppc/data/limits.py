"""What one file may cost the process that reads it: memory and processor time.

Decoders believe what a file says of itself. Beyond what is checked before, the system stops them: an allocation over
the limit fails, which refuses the file, and a process that computes for too long is ended, which the one that started
it notices.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_MEMORY_BYTES = 4 << 30
"""Memory that a file may take. The largest pictures that are read, 33 Mpixel of 16 bits, take 100 MiB each, and a
decoder keeps up to 17 of them; the rest is for the clips and for what finds the mouth."""
_resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # not on Windows


def limit_memory(more_bytes: int = FILE_MEMORY_BYTES) -> None:
    """From now on this process gets at most so much memory beyond what it has, where the system can see to it."""
    with contextlib.suppress(OSError, ValueError):  # a lower limit is set from outside
        used = _data_bytes()
        if used is not None:
            _set_soft("RLIMIT_DATA", used + more_bytes)


def limit_seconds(more: float | None) -> None:
    """From now on this process gets at most so many seconds of processor time (SIGXCPU); None: as many as it wants."""
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
