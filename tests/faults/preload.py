"""Faults in file operations: the library preload.c, and the plan by which its processes act."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from enum import IntEnum
from pathlib import Path

_LAYOUT = struct.Struct("=8q1024s1024s")  # struct Plan of preload.c
_SOURCE = Path(__file__).with_name("preload.c")


class Fault(IntEnum):
    """What happens at the operation that goes wrong."""

    NONE = 0
    COUNT = 1
    """Nothing goes wrong; operations are counted."""
    KILL = 2
    """The process that is at it gets SIGKILL."""
    FULL = 3
    """ENOSPC, at operations that may need space on the disk."""
    BROKEN = 4
    """EIO, at operations that change something."""
    UNREADABLE = 5
    """EIO, where something is opened for reading or read."""


class Plan:
    """What is to go wrong below a folder, and how many operations there were; shared with the processes that act."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self._root = os.fsencode(root)
        path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)

    def set(self, fault: Fault, at: int = 0, *, lasting: bool = False) -> None:
        """From now on operation `at` of those that the fault can meet goes wrong, and with lasting all later ones."""
        self._memory[:] = _LAYOUT.pack(fault, at, lasting, 0, 0, 0, 0, 0, self._root, b"")

    def stop(self) -> None:
        """Nothing goes wrong or is counted any more; what was counted stays."""
        self._memory[:8] = struct.pack("=q", Fault.NONE)

    def counts(self) -> dict[Fault, int]:
        """How many operations since `set` each fault could meet."""
        space, change, read = _LAYOUT.unpack(self._memory[:])[3:6]
        return {
            Fault.KILL: space + change,
            Fault.FULL: space,
            Fault.BROKEN: space + change,
            Fault.UNREADABLE: read,
        }

    @property
    def what(self) -> str:
        """The first operation that went wrong, such as "write /folder/file"; "" if none has."""
        return _LAYOUT.unpack(self._memory[:])[-1].rstrip(b"\0").decode(errors="replace")


def build(folder: Path) -> Path:
    """The library, compiled."""
    compiler = os.environ.get("CC") or shutil.which("cc") or "cc"
    library = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1"]
    subprocess.run([*command, "-o", str(library), str(_SOURCE), "-ldl"], check=True)
    return library
