"""What the compiler makes of the Triton kernels, without a GPU: `python tools/triton_report.py`.

Compiles every tile of the table for its architecture and prints registers, spilled bytes and shared memory as a
Markdown table (docs/kernels.md has it). The tests use `compile_kernel`, too.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from avppc.ops.info_nce.triton.tiles import KERNELS, SHARED_MEMORY_BYTES, SMALL, TABLE, Tile, TileKey, table_tile

REPORT_WIDTHS = (64, 128, 256, 512)
TARGETS = {SMALL: 86, 80: 80, 90: 90, 100: 100}
"""The compute capability that each architecture of the table is compiled for."""
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
MOMENT_PARTS = ("inside", "across")
MOMENT_KERNELS = ("fwd", "dq", "dz")


class Variant(NamedTuple):
    """One kernel in one form in which it is compiled."""

    kernel: str
    architecture: int
    dtype: str
    """A key of DTYPES."""
    width: int
    tile: Tile
    flags: tuple[str, ...] = ()
    """Any of "ids", "symmetric", "unaligned" (sizes that are not multiples of 16), "tf32", "ones" (every size is 1,
    which Triton takes for a constant); of `product` "dcontexts" or "dweights" (not queries), and "ragged" (tiles do not
    divide its sizes); of `lse` "no_positive". Where clips have moments "inside" or "across", and "both" where the
    kernels of one part add to the other's gradients."""

    @property
    def part(self) -> str:
        """Of the candidates, where clips have moments."""
        return next((part for part in MOMENT_PARTS if part in self.flags), "")

    def __str__(self) -> str:
        flags = "".join(f"-{flag}" for flag in self.flags)
        return f"{self.kernel}-sm{TARGETS[self.architecture]}-{self.dtype}-D{self.width}{flags}"


class Compiled(NamedTuple):
    """What a GPU would load."""

    registers: int
    spilled_bytes: int
    """The stack of a thread: what did not fit into the registers."""
    shared_bytes: int
    cubin: bytes


def table_variants(dtypes: tuple[str, ...] = ("bf16", "fp32")) -> Iterator[Variant]:
    """Every tile of the table, once for each width and architecture that uses it; then those of clips with moments."""
    kernels: list[tuple[str, tuple[str, ...]]] = [(kernel, ()) for kernel in KERNELS]
    kernels += [(kernel, (part, "both")) for part in MOMENT_PARTS for kernel in MOMENT_KERNELS]
    places = [place for place in TABLE if place[0] in TARGETS]
    for (architecture, itemsize), (kernel, flags) in itertools.product(places, kernels):
        for dtype, width in itertools.product(dtypes, REPORT_WIDTHS):
            if DTYPES[dtype] == itemsize:
                yield variant(kernel, architecture, dtype, width, flags)


def variant(kernel: str, architecture: int, dtype: str, width: int, flags: tuple[str, ...] = ()) -> Variant:
    """The kernel with the tile of the table."""
    extra_registers = "ids" in flags or "symmetric" in flags
    one = Variant(kernel, architecture, dtype, width, Tile(0, 0, 0, 0, 0, 0), flags)
    key = TileKey(architecture, DTYPES[dtype], width, "unaligned" in flags, extra_registers, one.part)
    return one._replace(tile=table_tile(kernel, key))


def compile_kernel(one: Variant) -> Compiled:
    """Compiles ahead of time; needs Triton, but no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, pointers, integers, constants = _signature(one)
    signature = {name: pointers.get(name) or integers.get(name) or "constexpr" for name in function.arg_names}
    multiples = () if "unaligned" in one.flags else _MULTIPLES
    aligned = [
        (place,)
        for place, parameter in enumerate(function.params)
        if parameter.name in pointers
        or (parameter.name in integers and parameter.name in multiples and not parameter.do_not_specialize)
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    tile = one.tile
    target = GPUTarget("cuda", TARGETS[one.architecture], 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers or None}
    compiled: Any = triton.compile(source, target=target, options=options)
    cubin: bytes = compiled.asm["cubin"]
    usage = _cuobjdump("--dump-resource-usage", cubin)
    found = re.search(rf"Function {function.__name__}:\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump tells nothing of {function.__name__}: {usage}")
    return Compiled(int(found[1]), int(found[2]), int(compiled.metadata.shared), cubin)


def sass(compiled: Compiled) -> str:
    """The machine code."""
    return _cuobjdump("--dump-sass", compiled.cubin)


_PRODUCT_SIZES = ("rows", "columns", "depth", "a_matrix", "a_row", "a_depth", "b_matrix", "b_depth", "b_column")
_MULTIPLES = (*_PRODUCT_SIZES, "N", "M", "D", "row_stride", "split_columns")
_INTEGERS = (
    *_MULTIPLES, "K", "L", "offset", "first_position", "tasks", "first_tile", "tiles", "parts", "Tc", "Tz", "tile_rows",
    "tile_columns",
)  # fmt: skip
_POINTERS_IN_INT32 = (
    "sorted_tasks", "sorted_targets", "target_starts", "starts", "a_index", "b_index", "candidates", "shifts",
)  # fmt: skip
_POINTERS_IN_DTYPE = ("q", "z", "dq", "dz", "ds_wave", "a", "b", "out")


def _signature(one: Variant) -> tuple[Any, dict[str, str], dict[str, str], dict[str, Any]]:
    """The kernel, the types of its pointers, the types of its integers, and its constants."""
    from avppc.ops.info_nce.triton import kernels_backward as bwd
    from avppc.ops.info_nce.triton import kernels_forward as fwd
    from avppc.ops.info_nce.triton import kernels_moments as moments
    from avppc.ops.info_nce.triton.backward import GROUP
    from avppc.ops.info_nce.triton.forward import FINISH_BLOCK

    of_moments = {
        "fwd": moments.moment_info_nce_fwd_kernel,
        "dq": moments.moment_info_nce_bwd_dq_kernel,
        "dz": moments.moment_info_nce_bwd_dz_kernel,
    }
    of_rows = {
        "product": fwd.info_nce_product_kernel,
        "fwd": fwd.info_nce_fwd_kernel,
        "dq": bwd.info_nce_bwd_dq_kernel,
        "dz": bwd.info_nce_bwd_dz_kernel,
        "ds": bwd.info_nce_bwd_ds_kernel,
        "lse": fwd.info_nce_lse_kernel,
    }
    function = (of_moments if one.part else of_rows)[one.kernel]
    tile, symmetric = one.tile, "symmetric" in one.flags
    output = tile.output(one.width)
    constants: dict[str, Any] = {
        "HAS_IDS": "ids" in one.flags,
        "COLUMNS": symmetric,
        "SYMMETRIC": symmetric,
        "HAS_DQ": True,
        "HAS_ALPHA": True,
        "FULL_N": "ragged" not in one.flags,
        "FULL_M": "ragged" not in one.flags,
        "EVEN": one.width % tile.d == 0 and one.width % max(output, 1) == 0,
        "WHOLE": tile.d >= one.width,
        "GROUP": GROUP,
        "BLOCK_N": tile.n,
        "BLOCK_M": tile.m,
        "BLOCK_D": tile.d,
        "BLOCK_O": output,
        "PRECISION": "tf32" if "tf32" in one.flags else "ieee",
        "HAS_POSITIVE": "no_positive" not in one.flags,
        "IS_COLUMN": symmetric,
        "BLOCK": FINISH_BLOCK,
        "OVER_CLIPS": one.part == "across",
        "PART": int(one.part == "inside"),
        "ADD": one.part == "inside" and "both" in one.flags,
        "FINAL": one.part == "inside" or "both" not in one.flags,
        "a_row" if "dweights" in one.flags else "a_depth": 1,
        "b_column" if {"dcontexts", "dweights"} & set(one.flags) else "b_depth": 1,
    }
    names = function.arg_names
    if "ones" in one.flags:
        constants |= {one.name: 1 for one in function.params if one.name in _INTEGERS and not one.do_not_specialize}
    constants = {name: value for name, value in constants.items() if name in names}
    types = dict.fromkeys(_POINTERS_IN_DTYPE, f"*{one.dtype}")
    types |= dict.fromkeys(_POINTERS_IN_INT32, "*i32") | dict.fromkeys(("context_ids", "target_ids"), "*i64")
    found = {name: "i32" for name in names if name in _INTEGERS and name not in constants}
    pointers = {name: types.get(name, "*fp32") for name in names if name not in constants and name not in found}
    return function, pointers, found, constants


def _cuobjdump(option: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of every tile, in Markdown.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    targets = sorted(TARGETS.values())
    parser.add_argument("--architectures", nargs="+", type=int, choices=targets, default=targets)
    arguments = parser.parse_args()
    wanted = arguments.architectures
    columns = ("kernel", "GPU", "dtype", "D", "tile (n, m, d, o)", "warps, stages", "registers", "spilled bytes")
    print("| " + " | ".join((*columns, "shared KiB (most)")) + " |")
    print("|---" * 9 + "|")
    variants = (one for one in table_variants(tuple(arguments.dtypes)) if TARGETS[one.architecture] in wanted)
    compiled = ((one, compile_kernel(one)) for one in variants)
    for _, group in itertools.groupby(compiled, key=lambda pair: (*pair[0][:3], pair[0].tile, pair[1][:3])):
        _print_row(list(group))


def _print_row(same: list[tuple[Variant, Compiled]]) -> None:
    """One row for all widths that do not differ in anything else."""
    one, found = same[0]
    tile, widths = one.tile, ", ".join(str(variant.width) for variant, _ in same)
    print(
        f"| {' '.join(filter(None, (one.kernel, one.part)))} | sm_{TARGETS[one.architecture]} | {one.dtype} | {widths} "
        f"| {tile.n}, {tile.m}, {tile.d}, {tile.output(one.width)} | {tile.warps}, {tile.stages} | {found.registers} "
        f"| {found.spilled_bytes} | {found.shared_bytes / 1024:.0f} "
        f"({SHARED_MEMORY_BYTES[one.architecture] >> 10}) |",
        flush=True,
    )


if __name__ == "__main__":
    main()
