"""Files of tensors in the safetensors format: a full or failing disk is told as the system says it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from avppc.files import read_bytes

_NUMBER = re.compile(r"\(os error (\d+)\)|in read-only mode: .*\((\d+)\)")  # safetensors' words, and torch's


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors, contiguous and on the CPU; OSError where the disk is full or fails."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise _system_error(error, path) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file.

    Raises:
        ValueError: it is not a whole safetensors file.
        OSError: it cannot be read.
    """
    try:
        return load(read_bytes(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def map_tensors(path: Path) -> dict[str, Tensor]:
    """As read_tensors, through a memory map: several processes that read one large file share its memory.

    A file that is cut short while the tensors are in use ends the process.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:  # so says the library of whatever keeps it from opening the file
        if path.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    except RuntimeError as error:
        raise _system_error(error, path) from error


def _system_error(error: Exception, path: Path) -> OSError:
    """The OSError behind an error of safetensors or torch, with the file's name."""
    found = _NUMBER.search(str(error))
    if found is None:
        return OSError(f"{path}: {error}")
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number), str(path))
