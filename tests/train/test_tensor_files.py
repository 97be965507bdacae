"""What is said of safetensors files that cannot be written or read."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avppc.train import checkpoint
from avppc.train.checkpoint import map_tensors, read_tensors, write_tensors

READERS = [read_tensors, map_tensors]


@pytest.mark.parametrize("read", READERS)
def test_what_was_written_is_read(read: Callable[[Path], dict[str, Tensor]], tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}
    write_tensors(tmp_path / "file", tensors)
    found = read(tmp_path / "file")
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in tensors.items()
    }


@pytest.mark.parametrize("read", READERS)
def test_a_damaged_file_is_a_value_error(read: Callable[[Path], dict[str, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.arange(6.0)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"{path} is not a whole safetensors file"):
        read(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


def test_a_file_that_does_not_fit_is_named_with_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "file"
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{path}'") as caught:
            write_tensors(path, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG


def test_a_mapped_file_that_cannot_be_opened_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.zeros(3)})
    for error in (
        FileNotFoundError(f"No such file or directory: {path}"),  # safetensors, whatever the system says
        RuntimeError(f"unable to open file <{path}> in read-only mode: Input/output error (5)"),  # torch
    ):

        def fail(path: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(checkpoint, "load_file", fail)
        with pytest.raises(OSError, match=rf"{os.strerror(errno.EIO)}: '{path}'"):
            map_tensors(path)
