"""Times and memory of functions on a GPU: inputs not in the cache, eager and as CUDA graphs, median with quantiles."""

from __future__ import annotations

import statistics
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
    function: Callable[[], object], *, budget_seconds: float = 0.4, rounds: tuple[int, int] = (5, 60)
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
    """The function as the replay of a CUDA graph; None where it cannot be captured, as what waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except (RuntimeError, torch.AcceleratorError):
        torch.cuda.synchronize()
        return None
    return graph.replay


def peak_extra_mib(function: Callable[[], object]) -> float:
    """The most memory that torch had given out at once during a call, above that at its start."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
