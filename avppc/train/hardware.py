"""What the machine has: its processor, packages, device, precision and memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from avppc.checks import check_device

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def cpu_model() -> str | None:
    """The processor's name, such as "AMD EPYC 9B14"; None if the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor()) or None


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """{package: its version}, in the order given; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. ValueError if the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:N]'; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:N]'; got {name!r}")
    return check_device("device", name)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether encoders run in bfloat16; under "auto", if the hardware multiplies it directly."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[object]:
    """A context in which torch computes in bfloat16 where that is safe; without bf16 it does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


class OtherPrograms:
    """How much of this machine's processors other programs take, by Linux's count of their time."""

    def __init__(self) -> None:
        self._before = _processor_seconds()

    def lap(self) -> float | None:
        """The share of all processors' time, 0 to 1, since this was last asked; None where the system does not tell."""
        now, before = _processor_seconds(), self._before
        self._before = now
        if now is None or before is None or now.all <= before.all:
            return None
        others = (now.busy - before.busy) - (now.own - before.own)
        return min(1.0, max(0.0, others / (now.all - before.all)))


class _ProcessorSeconds(NamedTuple):
    all: float
    busy: float
    own: float
    """Of this process and the children that it waited for."""


def _processor_seconds() -> _ProcessorSeconds | None:
    """Since the machine started, of all processors together."""
    try:
        numbers = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    whole, idle = sum(numbers), sum(numbers[3:5])  # idle, and idle while a disk was waited for
    return _ProcessorSeconds(whole / ticks, (whole - idle) / ticks, sum(os.times()[:4]))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside, for models so small that two threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def set_up_cpu(threads: int) -> None:
    """What a command does before it computes: so many threads for torch, 0: its own choice; freed memory is kept."""
    if threads:
        torch.set_num_threads(threads)
    keep_memory()


def keep_memory() -> None:
    """Lets glibc keep freed pages: a training step frees and takes the same large blocks again and again."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)
