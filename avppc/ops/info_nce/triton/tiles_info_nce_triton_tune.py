"""AVPPC_TUNE=1: measures which tile is fastest here, instead of taking the table's, and prints what it finds."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from avppc.ops._library import is_switched_on
from avppc.ops.info_nce.triton.tiles import INTERPRETER, SHARED_MEMORY_BYTES, Place, Tile, table_tile

_Result = TypeVar("_Result")
_Way = TypeVar("_Way")
_logger = logging.getLogger(__name__)
_found: dict[tuple[str, Place], Tile] = {}
_found_ways: dict[object, str] = {}
REPETITIONS = 5


def with_best_tile(kernel: str, place: Place, run: Callable[[Tile], _Result]) -> _Result:
    """What `run` returns with the table's tile; under AVPPC_TUNE=1 with the fastest candidate."""
    if not _is_tuning():
        return run(_found.get((kernel, place)) or table_tile(kernel, place))
    if (kernel, place) not in _found:
        _found[kernel, place] = _search(kernel, place, run)
    return run(_found[kernel, place])


def with_best_way(key: object, usual: str, ways: dict[str, _Way], run: Callable[[_Way], _Result]) -> _Result:
    """What `run` returns with the usual way; under AVPPC_TUNE=1 with the fastest way for this key."""
    if not _is_tuning():
        return run(ways[_found_ways.get(key, usual)])
    if key not in _found_ways:
        for way in ways.values():
            run(way)  # compiles, and finds the tiles
        times = {
            name: statistics.median(_milliseconds(run, way) for _ in range(REPETITIONS)) for name, way in ways.items()
        }
        _found_ways[key] = min(times, key=lambda name: times[name])
        print(f"tuned the backward at {key}: {times} ms; the table's is {usual!r}", flush=True)
    return run(ways[_found_ways[key]])


def _is_tuning() -> bool:
    is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return is_switched_on("AVPPC_TUNE") and not is_capturing


def candidates(kernel: str, place: Place) -> Iterator[Tile]:
    """The table's tile and others whose operands fit the shared memory."""
    first = table_tile(kernel, place)
    yield first
    if place.architecture == INTERPRETER:
        yield first._replace(d=first.d // 2, o=first.o // 2)
        return
    sizes = [(128, 128), (128, 64), (64, 128), (64, 64)]
    sizes += [(128, 256), (256, 128)] if kernel in ("fwd", "ds") else []
    step = 64 if place.itemsize == 2 else 32
    whole = 1 << (place.width - 1).bit_length()
    steps = {step, whole} if kernel in ("fwd", "dq", "dz") and whole <= 256 else {step}
    for (n, m), d, warps, stages in itertools.product(sizes, sorted(steps), (4, 8), (2, 3, 4)):
        outputs = (0,) if kernel not in ("dq", "dz") else (d,) if d >= place.width else (128, 256)
        limits = (0, 128) if warps == 8 else (0,)  # 128 registers a thread: two blocks on a processor
        for o, registers in itertools.product(outputs, limits):
            tile = Tile(n, m, d, o, warps, stages, registers)
            if tile != first and _fits(tile, place):
                yield tile


def _fits(tile: Tile, place: Place) -> bool:
    """Whether the operands of all stages fit into the shared memory (what is kept whole counts as a stage)."""
    operands = (tile.n + tile.m) * tile.d * tile.stages + tile.m * (0 if tile.o == tile.d else tile.o)
    return operands * place.itemsize <= SHARED_MEMORY_BYTES[place.architecture]


def _search(kernel: str, place: Place, run: Callable[[Tile], _Result]) -> Tile:
    times: dict[Tile, float] = {}
    for tile in candidates(kernel, place):
        try:
            run(tile)  # compiles
            times[tile] = statistics.median(_milliseconds(run, tile) for _ in range(REPETITIONS))
        except Exception as error:  # a tile that does not compile or launch is left out; Triton's errors share no base
            _logger.info("%s %s does not run: %s", kernel, tile, str(error).split("\n")[0])
    if not times:
        raise RuntimeError(f"AVPPC_TUNE=1 found no tile of {kernel!r} that runs for {place}")
    best = min(times, key=lambda tile: times[tile])
    first = table_tile(kernel, place)
    was = f"{times[first]:.4f} ms" if first in times else "does not run"
    print(f"tuned {kernel!r} at {place}: {best} {times[best]:.4f} ms; the table's {first} {was}", flush=True)
    return best


def _milliseconds(run: Callable[[_Way], object], way: _Way) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run(way)
        return (time.perf_counter() - start) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run(way)
    after.record()
    after.synchronize()
    return before.elapsed_time(after)
