"""Times and memory of functions on a GPU: inputs not in the cache, eager and as CUDA graphs, median with quantiles."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 << 20  # more than twice any second-level cache there is


class GpuTimes(NamedTuple):
    """Milliseconds of one call."""

    median: float
    q20: float
    q80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> GpuTimes:
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(statistics.median(milliseconds), fifths[0], fifths[3])

    def rounded(self) -> list[float]:
        return [round(value, 4) for value in self]


def times(
    function: Callable[[], object], *, budget_seconds: float = 0.3, rounds: tuple[int, int] = (3, 60)
) -> GpuTimes:
    """Times of a function that has been called before; each round finds a cache full of other things."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def one_round() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        function()
        after.record()
        return before, after

    def milliseconds(events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in events]

    probe = milliseconds([one_round() for _ in range(2)])[-1]
    count = int(max(rounds[0], min(rounds[1], budget_seconds * 1e3 / max(probe, 1e-3))))
    return GpuTimes.of(milliseconds([one_round() for _ in range(count)]))


def as_graph(function: Callable[[], object]) -> Callable[[], object] | None:
    """A function that has been called before as the replay of a CUDA graph; None where it cannot be captured.

    What would fail is found out first: after a capture that failed, torch up to 2.11 gives no random numbers on the
    device and frees no memory any more (pytorch/pytorch#180395).
    """
    needed = _memory_without_waiting(function)
    torch.cuda.empty_cache()  # a graph has a pool of its own
    if needed is None or 1.1 * needed > torch.cuda.mem_get_info()[0]:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer one leaves the stream as it was where a capture fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            function()
    except (RuntimeError, torch.AcceleratorError):
        torch.cuda.synchronize()
        return None
    return graph.replay


def _memory_without_waiting(function: Callable[[], object]) -> int | None:
    """Bytes that a call takes at once; None where it waits for the device, or takes more than there are."""
    before, mode = torch.cuda.memory_allocated(), torch.cuda.get_sync_debug_mode()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode does not see all that waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return torch.cuda.max_memory_allocated() - before


def peak_extra_mib(function: Callable[[], object]) -> float:
    """The most memory that torch had given out at once during a call, above that at its start."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
