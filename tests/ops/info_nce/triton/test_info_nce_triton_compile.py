"""The Triton kernels compiled ahead of time for GPUs that are not here: no spills, shared memory, tensor cores."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

import pytest
import torch
from info_nce_cases import Case
from test_moments import Case as MomentCase
from triton_report import MOMENT_KERNELS, MOMENT_PARTS, Compiled, Variant, compile_kernel, sass, table_variants, variant

from avppc.ops.info_nce.moments import make_moment_problem
from avppc.ops.info_nce.problem import make_problem
from avppc.ops.info_nce.triton import tiles
from avppc.ops.info_nce.triton.tiles import (
    KERNELS,
    SHARED_MEMORY_BYTES,
    SMALL,
    Tile,
    TileKey,
    recompute_in_backward,
    table_tile,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


def distinct(variants: list[Variant]) -> list[Variant]:
    """One of those that compile to the same code: width counts only for whether it is kept on the chip."""
    found: dict[object, Variant] = {}
    for one in variants:
        found.setdefault((*one[:3], one.tile, one.width <= one.tile.d, one.flags), one)
    return list(found.values())


# Whatever the table holds is compiled for sm_80, sm_90 and sm_100 in bfloat16; of what else there is, a part, for the
# time it takes (tools/triton_report.py compiles it all).
TABLE = distinct([one for one in table_variants(("bf16",)) if one.architecture != SMALL and not one.part])
TABLE += [variant(kernel, architecture, "fp32", 512) for kernel in KERNELS for architecture in (90,)]
LSE_FLAGS: list[tuple[str, ...]] = [(), ("symmetric",), ("no_positive",), ("ones",)]
OTHERS = [variant(kernel, SMALL, "bf16", 512) for kernel in KERNELS]
OTHERS += [variant(kernel, 90, "bf16", 123, ("ids", "unaligned")) for kernel in KERNELS]
OTHERS += [variant(kernel, 100, "bf16", 64, ("ids", "symmetric")) for kernel in KERNELS if kernel != "product"]
OTHERS += [variant(kernel, 90, "bf16", 512, ("ids", "symmetric")) for kernel in KERNELS if kernel != "product"]
OTHERS += [variant(kernel, 90, "bf16", 1, ("unaligned", "ones")) for kernel in KERNELS]
PRODUCTS: list[tuple[str, ...]] = [(), ("dcontexts",), ("dweights",)]
PRODUCTS += [(*form, "ragged") for form in PRODUCTS]
OTHERS += [variant("product", a, "bf16", 512, form) for a in (80, 90, 100) for form in PRODUCTS[1:]]
OTHERS += [Variant("lse", 90, "fp32", 1, Tile(1, 1, 1, 0, 4, 3), flags) for flags in LSE_FLAGS]
OTHERS += [variant("fwd", 90, "fp16", 512), variant("fwd", 90, "fp32", 512, ("tf32",))]

# Of clips with moments all kernels for sm_90, and a part for the others.
MOMENTS = [variant(k, 90, "bf16", w, (p, "both")) for p in MOMENT_PARTS for k in MOMENT_KERNELS for w in (128, 512)]
MOMENTS += [
    variant(k, a, "bf16", 128, (p, "both")) for k in MOMENT_KERNELS for a, p in ((80, "inside"), (100, "across"))
]
MOMENTS += [variant(k, 90, "bf16", 123, ("across", "ids", "unaligned")) for k in MOMENT_KERNELS]
MOMENTS += [variant(k, 90, "fp32", 128, ("inside",)) for k in MOMENT_KERNELS]
MOMENTS += [variant(k, SMALL, "bf16", 64, ("across", "ids")) for k in MOMENT_KERNELS]


def check(one: Variant) -> Compiled:
    compiled = compile_kernel(one)
    assert compiled.spilled_bytes == 0, f"{one.tile}: {compiled.spilled_bytes} bytes do not fit the registers"
    most = SHARED_MEMORY_BYTES[one.architecture]
    assert compiled.shared_bytes <= most, f"{one.tile}: {compiled.shared_bytes} bytes of shared memory, {most} allowed"
    return compiled


@pytest.mark.parametrize("one", TABLE, ids=str)
def test_every_tile_of_the_table_fits_its_gpu(one: Variant) -> None:
    check(one)


@pytest.mark.parametrize("one", OTHERS, ids=str)
def test_options_fit_too(one: Variant) -> None:
    check(one)


@pytest.mark.parametrize("one", MOMENTS, ids=str)
def test_tiles_of_moments_fit_too(one: Variant) -> None:
    check(one)


def loads_by_element(code: str) -> list[str]:
    """Loads of single elements of bfloat16."""
    return re.findall(r"(?:LDG|LDGSTS)\S*\.[US](?:8|16) .*", code)


HOPPER = [one for one in TABLE if (one.architecture, one.dtype) == (90, "bf16")]
HOPPER += [variant("product", 90, "bf16", 512, form) for form in PRODUCTS[1:]]
HOPPER += [one for one in MOMENTS if (one.architecture, one.width % 64) == (90, 0) and one.dtype == "bf16"]


@pytest.mark.parametrize("one", HOPPER, ids=str)
def test_products_run_on_hoppers_tensor_cores(one: Variant) -> None:
    """Warp-group products that wait for each other once a group, from shared memory that is loaded while they run."""
    code = sass(compile_kernel(one))
    products, waits = len(re.findall("HGMMA", code)), len(re.findall("WARPGROUP.DEPBAR", code))
    assert products > 0
    assert waits <= products / 2, f"{products} products wait {waits} times"
    assert re.search(r"LDGSTS\S*\.128", code) or "UTMALDG" in code
    assert not loads_by_element(code)
    assert "RED." not in code, "no atomics"
    assert "ATOM" not in code, "no atomics"


@pytest.mark.parametrize(("architecture", "instruction"), [(80, "HMMA"), (100, "UTCHMMA")])
@pytest.mark.parametrize("part", ["", *MOMENT_PARTS])
def test_products_run_on_other_tensor_cores(part: str, architecture: int, instruction: str) -> None:
    code = sass(compile_kernel(variant("fwd", architecture, "bf16", 128, (part,) if part else ())))
    assert instruction in code
    assert not loads_by_element(code)


def test_every_place_has_a_tile() -> None:
    for architecture in SHARED_MEMORY_BYTES:
        for itemsize in (2, 4):
            for width in (1, 64, 65, 123, 256, 1024, 8192):
                for flags in ({}, {"unaligned": True}, {"extra_registers": True}, *({"part": p} for p in MOMENT_PARTS)):
                    for kernel in MOMENT_KERNELS if "part" in flags else KERNELS:
                        key = TileKey(architecture, itemsize, width, **flags)
                        assert table_tile(kernel, key).output(width) > 0 or kernel not in ("dq", "dz")


@pytest.mark.parametrize(
    ("width", "rows", "expected"), [(512, 4096, False), (256, 4096, True), (512, 256, True), (1024, 1024, False)]
)
def test_the_backward_goes_by_shape(width: int, rows: int, expected: bool) -> None:
    """The 42 sub-tasks on a GPU of 132 processors."""
    key = TileKey(90, 2, width)
    tile = table_tile("dz", key)
    target_tiles = 10 * -(-rows // tile.m) * -(-width // tile.output(width))
    assert recompute_in_backward(key, 42 * rows * rows, target_tiles, 132) == expected


class Hopper:
    """The part of Triton's driver that a launch asks before it loads anything onto a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches bind their arguments and compile as on an H100, and end before a GPU is needed; their kernels' names."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    run = JITFunction.run

    def compile_alone(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names.append(self.__name__)
        assert all(size > 0 for size in grid)
        return run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_alone)
    monkeypatch.setattr(tiles, "architecture_of", lambda _: 90)
    monkeypatch.setattr(tiles, "processors_of", lambda _: 132)
    return names


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "case",
    [Case(N=1, Dc=1, Dz=1, K=1), Case(N=100, extra=3, offset=2, ids=5, Dc=24, Dz=24, dtype=torch.bfloat16)],
    ids=str,
)
def test_launches_bind_and_compile(
    case: Case, recompute: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the interpreter does not see: constants, sizes of 1, alignment. Values are whatever the memory held."""
    from avppc.ops.info_nce.triton.backward import info_nce_triton_backward
    from avppc.ops.info_nce.triton.forward import info_nce_triton

    monkeypatch.setattr(tiles, "recompute_in_backward", lambda *_: recompute)
    with torch.no_grad():
        problem = make_problem(**case.arguments())
        rows, _, *saved = info_nce_triton(*problem)
        gradients = info_nce_triton_backward(*problem, *saved, torch.zeros_like(rows), True, True, True, True)
    inputs = (problem.contexts, problem.targets, problem.weights, problem.scale)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in inputs]
    backward = ["dq_kernel", "dz_kernel"] if recompute else ["ds_kernel"] * min(case.K, 2)  # a wave for each target
    expected = ["product", "fwd", "lse", *backward, "product", "product"]
    assert [part in name for part, name in zip(expected, launched, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (MomentCase(N=1, Tc=1, Tz=1, Dc=1, Dz=1, K=1, candidates="clip"), 1),
        (MomentCase(N=20, Dc=24, Dz=24, K=3, ids=True, dtype=torch.bfloat16), 2),
    ],
    ids=["ones", "all"],
)
def test_launches_of_moments_bind_and_compile(case: MomentCase, kernels: int, launched: list[str]) -> None:
    """A launch of each kernel for each part of the candidates, however many sub-tasks there are."""
    from avppc.ops.info_nce.triton.moments import info_nce_moments_triton, info_nce_moments_triton_backward

    with torch.no_grad():
        problem = make_moment_problem(**case.arguments())
        rows, _, *saved = info_nce_moments_triton(*problem)
        gradients = info_nce_moments_triton_backward(*problem, *saved, torch.zeros_like(rows), True, True, True, True)
    inputs = (problem.contexts, problem.targets, problem.weights, problem.scale)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in inputs]
    expected = ["product", *["fwd"] * kernels, "lse", *["dq_kernel", "dz_kernel"] * kernels, "product", "product"]
    assert [part in name for part, name in zip(expected, launched, strict=True)] == [True] * len(expected)
    assert all("moment_info_nce" in name for name in launched if "product" not in name and "lse" not in name)


@pytest.mark.parametrize(("rows", "width", "unaligned"), [(100, 64, False), (1001, 64, False), (128, 60, True)])
def test_only_what_lies_along_memory_must_be_aligned(
    rows: int, width: int, unaligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of rows takes the wide tiles; a width whose rows do not start at 16 bytes takes the narrow ones."""
    from avppc.ops.info_nce.triton import backward, forward

    keys: list[TileKey] = []
    monkeypatch.setattr(tiles, "architecture_of", lambda _: 90)
    monkeypatch.setattr(forward, "with_best_tile", lambda _, key, __: keys.append(key))
    with torch.no_grad():
        case = Case(N=rows, Dc=width, Dz=width, dtype=torch.bfloat16)
        launch = forward.LaunchArguments.of(make_problem(**case.arguments()))
        queries = forward.queries_of(launch)
        backward.dcontexts_and_dweights(launch, queries, queries[0, 0, 0], backward.Needs(True, True, True, True))
    assert [key.unaligned for key in keys] == [unaligned] * 3
