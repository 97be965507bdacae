"""The tiles in which the Triton kernels of the bilinear InfoNCE work: a table for each architecture.

The table is fixed, so that results repeat. AVPPC_TUNE=1 measures which candidate is fastest here instead, and prints
what it finds.
"""

from __future__ import annotations

import functools
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch

from avppc.ops import _library
from avppc.ops._library import is_switched_on

KERNELS = ("product", "fwd", "dq", "dz", "ds")
INTERPRETER = 0
"""The architecture of Triton's interpreter, which runs the kernels on the CPU."""
SMALL = 1
"""The architecture of GPUs whose blocks have at most 99 KiB of shared memory, and of those that the table lacks."""
SHARED_MEMORY_BYTES = {INTERPRETER: 99 << 10, SMALL: 99 << 10, 80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""The most that one block may have."""

COLUMN_STATISTICS_BYTES = 256 << 20
"""The bound on the statistics of columns by row tile that a symmetric loss keeps before they are combined."""

_Result = TypeVar("_Result")
_Method = TypeVar("_Method")
_logger = logging.getLogger(__name__)
_found: dict[tuple[str, TileKey], Tile] = {}
_found_methods: dict[object, str] = {}
REPETITIONS = 5


class Tile(NamedTuple):
    """How one kernel divides its work."""

    n: int
    """Rows of a tile of logits (of `product`: rows of its output)."""
    m: int
    """Columns of a tile of logits (of `product`: columns of its output)."""
    d: int
    """Width of one step of a product; if it is D or more, rows stay on the chip as a whole."""
    o: int
    """For dq and dz: the columns of the gradient that one program computes, unless d is the whole width."""
    warps: int
    stages: int
    registers: int = 0
    """The most that a thread may have; 0: the compiler decides."""

    def output(self, width: int) -> int:
        """The columns of a gradient of this width that one program computes."""
        return self.d if self.d >= width else self.o


class TileKey(NamedTuple):
    """What the choice of a tile depends on."""

    architecture: int
    """80, 90, 100, SMALL or INTERPRETER."""
    itemsize: int
    """Bytes of an element: 2 (bfloat16, float16) or 4 (float32)."""
    width: int
    """D"""
    unaligned: bool = False
    """Whether rows do not start at multiples of 16 bytes, and are loaded element by element."""
    extra_registers: bool = False
    """Whether there are ids or the loss is symmetric, so that more is kept in registers."""
    part: str = ""
    """Where clips have moments, the part of the candidates: "inside" clips or "across" them."""


WIDTHS = (64, 128, 256, 1 << 30)
"""The table has a column for each of these widths and those below."""
_Row = tuple[Tile, ...]


def _same(tile: Tile) -> _Row:
    return (tile,) * len(WIDTHS)


_WIDE = Tile(128, 128, 64, 0, 8, 3)
_WIDER = Tile(128, 256, 64, 0, 8, 3)  # two thirds of the loads of _WIDE for the same products
_HALF_90: dict[str, _Row] = {
    "product": _same(_WIDE),
    "fwd": (Tile(128, 128, 64, 0, 8, 3), Tile(128, 128, 128, 0, 8, 2), _WIDER, _WIDER),
    "dq": (
        Tile(128, 64, 64, 64, 8, 3),
        Tile(128, 64, 128, 128, 8, 2),
        Tile(64, 64, 256, 256, 8, 2),
        Tile(64, 64, 64, 256, 8, 2),
    ),
    "dz": (
        Tile(64, 128, 64, 64, 8, 3),
        Tile(64, 128, 128, 128, 8, 2),
        Tile(64, 64, 64, 256, 8, 3),
        Tile(64, 64, 64, 256, 8, 3),
    ),
    "ds": _same(_WIDE),
}
_NARROW = Tile(128, 128, 32, 0, 8, 4)
_HALF_80: dict[str, _Row] = {
    "product": _same(_NARROW),
    "fwd": (Tile(128, 64, 64, 0, 8, 2), _NARROW, _NARROW, _NARROW),
    "dq": (
        Tile(64, 64, 64, 64, 4, 2),
        Tile(64, 64, 128, 128, 8, 2),
        Tile(64, 32, 256, 256, 8, 2),
        Tile(64, 64, 32, 128, 8, 2),
    ),
    "dz": (
        Tile(64, 64, 64, 64, 4, 2),
        Tile(64, 64, 128, 128, 8, 2),
        Tile(32, 64, 256, 256, 8, 2),
        Tile(64, 64, 32, 128, 8, 2),
    ),
    "ds": _same(_NARROW),
}
_LITTLE = Tile(64, 64, 32, 0, 4, 3)
_HALF_SMALL: dict[str, _Row] = {
    "product": _same(_LITTLE),
    "fwd": _same(_LITTLE),
    "dq": (Tile(64, 32, 64, 64, 4, 2), *(Tile(64, 32, 32, 128, 4, 2),) * 3),
    "dz": (Tile(32, 64, 64, 64, 4, 2), *(Tile(32, 64, 32, 128, 4, 2),) * 3),
    "ds": _same(_LITTLE),
}
_PLAIN = Tile(64, 64, 32, 0, 8, 2)
_FLOAT: dict[str, _Row] = {  # for every architecture: the products take long, whatever the tiles
    "product": _same(_PLAIN),
    "fwd": _same(_PLAIN),
    "dq": _same(Tile(32, 32, 32, 64, 4, 2)),
    "dz": _same(Tile(32, 32, 32, 64, 4, 2)),
    "ds": _same(_PLAIN),
}
_INTERPRETED: dict[str, _Row] = {  # small, so that small problems have several of everything
    "product": _same(Tile(64, 64, 64, 0, 4, 2)),
    "fwd": _same(Tile(64, 32, 64, 0, 4, 2)),
    "dq": _same(Tile(64, 64, 64, 64, 4, 2)),
    "dz": _same(Tile(64, 64, 64, 64, 4, 2)),
    "ds": _same(Tile(32, 64, 64, 0, 4, 2)),
}
TABLE: dict[tuple[int, int], dict[str, _Row]] = {
    (80, 2): _HALF_80,
    (90, 2): _HALF_90,
    (100, 2): {
        **_HALF_90,
        "fwd": (*_HALF_90["fwd"][:2], _WIDE, _WIDE),
        "dq": (Tile(64, 64, 64, 64, 8, 3), Tile(64, 64, 128, 128, 8, 2), *_HALF_90["dq"][2:]),
    },
    (SMALL, 2): _HALF_SMALL,
    **{(architecture, 4): _FLOAT for architecture in (SMALL, 80, 90)},
    (100, 4): {**_FLOAT, "dz": _same(Tile(32, 32, 32, 64, 8, 2))},
    **{(INTERPRETER, itemsize): _INTERPRETED for itemsize in (2, 4)},
}

_INSIDE_ROW = (Tile(64, 64, 32, 64, 4, 3), Tile(64, 64, 64, 128, 4, 3), *(Tile(64, 64, 64, 256, 8, 3),) * 2)
_INSIDE_HALF: dict[str, _Row] = {"fwd": _same(Tile(64, 64, 64, 0, 4, 3)), "dq": _INSIDE_ROW, "dz": _INSIDE_ROW}
INSIDE = {place: _INSIDE_HALF if place[1] == 2 and place[0] != INTERPRETER else rows for place, rows in TABLE.items()}
"""The same for candidates inside clips: the rows and columns of a tile are those of a few clips, five of 12 moments."""
ACROSS = {place: dict(rows) for place, rows in TABLE.items()}
"""The same for candidates across clips, whose kernels need more registers."""
ACROSS[90, 2]["fwd"] = (*_HALF_90["fwd"][:2], _WIDE, _WIDE)
ACROSS[100, 2]["fwd"] = _same(Tile(128, 64, 64, 0, 8, 3))
ACROSS[100, 2]["dz"] = (Tile(64, 64, 64, 64, 8, 3), Tile(64, 64, 128, 128, 8, 2), *_HALF_90["dz"][2:])
ACROSS[100, 4]["dq"] = _same(Tile(32, 32, 32, 64, 8, 2))
ACROSS[SMALL, 2]["dz"] = (Tile(32, 64, 32, 64, 4, 2), *_HALF_SMALL["dz"][1:])

EXTRA_REGISTERS: dict[tuple[int, int, str], Tile] = {
    (90, 2, "fwd"): _WIDE,
    (100, 2, "fwd"): Tile(128, 64, 64, 0, 8, 3),
    (100, 2, "ds"): Tile(128, 64, 64, 0, 8, 3),
}
"""Where the table's tile would not fit the registers with ids or symmetric; keys: architecture, itemsize, kernel."""
UNALIGNED: dict[int, dict[str, Tile]] = {
    2: {
        "product": Tile(64, 64, 16, 0, 8, 2),
        "fwd": Tile(64, 64, 16, 0, 8, 2),
        "dq": Tile(32, 32, 16, 64, 8, 2),
        "dz": Tile(32, 32, 16, 64, 8, 2),
        "ds": Tile(64, 64, 16, 0, 8, 2),
    },
    4: {
        "product": Tile(64, 64, 16, 0, 8, 2),
        "fwd": Tile(64, 32, 16, 0, 8, 2),
        "dq": Tile(32, 16, 16, 64, 8, 2),
        "dz": Tile(32, 16, 16, 64, 8, 2),
        "ds": Tile(64, 32, 16, 0, 8, 2),
    },
}
"""Of every architecture, by bytes of an element, for rows that do not start at multiples of 16 bytes."""


def table_tile(kernel: str, key: TileKey) -> Tile:
    """The tile of the table."""
    if key.unaligned and key.architecture != INTERPRETER:
        return UNALIGNED[key.itemsize][kernel]
    if key.extra_registers and not key.part and (key.architecture, key.itemsize, kernel) in EXTRA_REGISTERS:
        return EXTRA_REGISTERS[key.architecture, key.itemsize, kernel]
    column = next(i for i, width in enumerate(WIDTHS) if key.width <= width)
    table = {"": TABLE, "inside": INSIDE, "across": ACROSS}[key.part]
    return table[key.architecture, key.itemsize][kernel][column]


class Backward(NamedTuple):
    """How the backward of one architecture goes: by two kernels that compute the logits again, or by waves of rows."""

    recompute_width: int
    """The largest D at which a gradient's tile leaves the registers room for logits."""
    recompute_logits: int
    """Up to this K N M, launches take longer than arithmetic, and recomputation needs the fewest."""
    wave_bytes: int
    """The bound on the workspace of waves; the second-level cache is 40 MB (A100), 50 MB (H100), 126 MB (B200)."""


BACKWARD = {
    INTERPRETER: Backward(64, 1 << 12, 1 << 14),
    SMALL: Backward(128, 1 << 22, 32 << 20),
    80: Backward(128, 1 << 23, 32 << 20),
    90: Backward(256, 1 << 23, 64 << 20),
    100: Backward(256, 1 << 23, 64 << 20),
}


def recompute_in_backward(key: TileKey, logits: int, tiles: int, processors: int) -> bool:
    """Whether the backward goes by recomputation, without a workspace.

    Args:
        key: as for the tiles.
        logits: K N M.
        tiles: how many tiles of the targets' gradients are computed at a time, which keeps the GPU busy.
        processors: of the GPU.
    """
    limits = BACKWARD[key.architecture]
    wide = key.width <= limits.recompute_width and tiles >= processors
    return wide or (logits <= limits.recompute_logits and 2 * tiles >= processors)


@functools.cache
def architecture_of(device: torch.device) -> int:
    """The architecture of the table to which a device belongs."""
    if _library.triton_interprets():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): 80, (8, 7): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get((major, minor), SMALL)


@functools.cache
def processors_of(device: torch.device) -> int:
    """The number of processors of a GPU, which run at the same time; for the interpreter a small number."""
    if _library.triton_interprets():
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def with_best_tile(kernel: str, key: TileKey, call: Callable[[Tile], _Result]) -> _Result:
    """What `call` returns with the table's tile; under AVPPC_TUNE=1 with the fastest candidate."""
    if not _is_tuning():
        return call(_found.get((kernel, key)) or table_tile(kernel, key))
    if (kernel, key) not in _found:
        _found[kernel, key] = _search(kernel, key, call)
    return call(_found[kernel, key])


def with_best_method(
    key: object, usual: str, methods: dict[str, _Method], call: Callable[[_Method], _Result]
) -> _Result:
    """What `call` returns with the usual method; under AVPPC_TUNE=1 with the fastest method for this key."""
    if not _is_tuning():
        return call(methods[_found_methods.get(key, usual)])
    if key not in _found_methods:
        for method in methods.values():
            call(method)  # compiles, and finds the tiles
        times = {
            name: statistics.median(_milliseconds(call, method) for _ in range(REPETITIONS))
            for name, method in methods.items()
        }
        _found_methods[key] = min(times, key=lambda name: times[name])
        print(f"tuned the backward at {key}: {times} ms; the table's is {usual!r}", flush=True)
    return call(methods[_found_methods[key]])


def _is_tuning() -> bool:
    is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return is_switched_on("AVPPC_TUNE") and not is_capturing


def candidates(kernel: str, key: TileKey) -> Iterator[Tile]:
    """The table's tile and others whose operands fit the shared memory."""
    first = table_tile(kernel, key)
    yield first
    if key.architecture == INTERPRETER:
        yield first._replace(d=first.d // 2, o=first.o // 2)
        return
    sizes = [(128, 128), (128, 64), (64, 128), (64, 64)]
    sizes += [(128, 256), (256, 128)] if kernel in ("fwd", "ds") else []
    step = 64 if key.itemsize == 2 else 32
    whole = 1 << (key.width - 1).bit_length()
    steps = {step, whole} if kernel in ("fwd", "dq", "dz") and whole <= 256 else {step}
    for (n, m), d, warps, stages in itertools.product(sizes, sorted(steps), (4, 8), (2, 3, 4)):
        outputs = (0,) if kernel not in ("dq", "dz") else (d,) if d >= key.width else (128, 256)
        limits = (0, 128) if warps == 8 else (0,)  # 128 registers a thread: two blocks on a processor
        for o, registers in itertools.product(outputs, limits):
            tile = Tile(n, m, d, o, warps, stages, registers)
            if tile != first and _fits(tile, key):
                yield tile


def _fits(tile: Tile, key: TileKey) -> bool:
    """Whether the operands of all stages fit into the shared memory (what is kept whole counts as a stage)."""
    operands = (tile.n + tile.m) * tile.d * tile.stages + tile.m * (0 if tile.o == tile.d else tile.o)
    return operands * key.itemsize <= SHARED_MEMORY_BYTES[key.architecture]


def _search(kernel: str, key: TileKey, call: Callable[[Tile], _Result]) -> Tile:
    times: dict[Tile, float] = {}
    for tile in candidates(kernel, key):
        try:
            call(tile)  # compiles
            times[tile] = statistics.median(_milliseconds(call, tile) for _ in range(REPETITIONS))
        except Exception as error:  # a tile that does not compile or launch is left out; Triton's errors share no base
            _logger.info("%s %s does not run: %s", kernel, tile, str(error).split("\n")[0])
    if not times:
        raise RuntimeError(f"AVPPC_TUNE=1 found no tile of {kernel!r} that runs for {key}")
    best = min(times, key=lambda tile: times[tile])
    first = table_tile(kernel, key)
    was = f"{times[first]:.4f} ms" if first in times else "does not run"
    print(f"tuned {kernel!r} at {key}: {best} {times[best]:.4f} ms; the table's {first} {was}", flush=True)
    return best


def _milliseconds(call: Callable[[_Method], object], method: _Method) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call(method)
        return (time.perf_counter() - start) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call(method)
    after.record()
    after.synchronize()
    return before.elapsed_time(after)
