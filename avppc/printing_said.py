"""What a command only says, on standard error, never ends its work: neither a full disk below a log file nor a closed
pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _LenientStream:
    """A text stream whose writes may fail, unnoticed; what could not be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            drop_held_back(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop_held_back(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_stderr() -> Iterator[None]:
    """Makes sys.stderr lenient inside."""
    strict = sys.stderr
    if strict is None:  # closed before Python started
        yield
        return
    sys.stderr = _LenientStream(strict)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = strict


def drop_held_back(stream: TextIO) -> None:
    """Empties the buffer of a stream that cannot be written to: at its end Python tries again, and exits with 120."""
    with contextlib.suppress(OSError, ValueError):  # no file, or closed
        descriptor = stream.fileno()
        kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, descriptor)
            stream.flush()
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)
            os.close(nowhere)
