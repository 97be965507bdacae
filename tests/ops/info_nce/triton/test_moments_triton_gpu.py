"""The Triton kernels of moment_info_nce on a GPU. AVPPC_REQUIRE_GPU=1 makes its absence a failure, not a skip."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from gpu_fixtures import capture, nan_filled_memory  # noqa: F401 - a fixture
from test_moments import BF16, CASES, F16, F32, TOLERANCES, Case, as_double, leaves
from torch import Tensor
from torch.library import opcheck

from avppc.ops import _library
from avppc.ops.info_nce.moments import CANDIDATES, Candidates, make_moment_problem, moment_info_nce

MISSING = None if torch.cuda.is_available() else "no CUDA device is available to torch"
if MISSING is None:
    MISSING = _library.triton_missing_reason("cuda", torch.cuda.current_device())
pytestmark = pytest.mark.skipif(
    MISSING is not None and os.environ.get("AVPPC_REQUIRE_GPU") != "1", reason=f"Triton kernels on a GPU: {MISSING}"
)

SIZES = [
    Case(N=128, Tc=12, Tz=12, Dc=128, Dz=128, K=6),
    Case(N=100, Tc=5, Tz=13, extra=3, offset=2, Dc=64, Dz=256, K=6, ids=True),
    Case(N=3, Tc=26, Tz=26, Dc=512, Dz=512, K=3),
    Case(N=70, Tc=1, Tz=6, Dc=33, Dz=65, K=6, ids=True),
    Case(N=2, Tc=70, Tz=150, Dc=72, Dz=72, K=3),
]


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values on the GPU, but for the pairs."""
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return {**moved, "pairs": arguments["pairs"]}


def with_gradients(arguments: dict[str, Any], upstream: Tensor, backend: str) -> list[Tensor]:
    inputs = leaves(arguments)
    rows = moment_info_nce(**arguments, reduction="none", backend=backend)
    return [rows.detach(), *torch.autograd.grad(rows, inputs, upstream.to(rows))]


def upstream_of(case: Case) -> Tensor:
    return torch.rand(case.K, case.N, case.Tc, generator=torch.Generator().manual_seed(1))


HALVES = [case._replace(dtype=dtype) for case in SIZES[:4] for dtype in (BF16, F16)]


@pytest.mark.parametrize("case", [*CASES, *SIZES, *HALVES], ids=str)
def test_it_is_its_definition(case: Case) -> None:
    """In float64 on the CPU. Logits of a wide D get a unit variance: their rounding grows with them."""
    arguments = case.arguments()
    for name in ("contexts", "weights"):
        if arguments[name] is not None:
            arguments[name] = arguments[name] / max(1.0, (arguments[name].shape[-1] / 16) ** 0.5)
    truth = with_gradients(as_double(arguments), upstream_of(case), "reference")
    got = with_gradients(on_gpu(arguments), upstream_of(case), "triton")
    assert [x.dtype for x in got] == [F32, *[case.dtype] * (len(got) - 2), F32]
    for found, expected in zip(got, truth, strict=True):
        error = (found.cpu().double() - expected).abs().max()
        assert error <= 2 * TOLERANCES[case.dtype] * expected.abs().max().clamp_min(0.1)


def test_auto_is_triton() -> None:
    arguments = on_gpu(SIZES[0].arguments())
    assert torch.equal(moment_info_nce(**arguments), moment_info_nce(**arguments, backend="triton"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    case = SIZES[1]._replace(dtype=dtype)
    runs = [with_gradients(on_gpu(case.arguments()), upstream_of(case), "triton") for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_runs_in_a_cuda_graph() -> None:
    """Loss and gradients; replayed on other values they are what an eager step gives on them."""
    arguments = on_gpu(Case(N=64, Tc=5, Tz=7, Dc=64, Dz=64, ids=True, dtype=BF16).arguments())
    inputs = leaves(arguments)

    def step() -> tuple[Tensor, ...]:
        loss = moment_info_nce(**arguments, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    graph, captured = capture(step)
    with torch.no_grad():
        arguments["contexts"].normal_()
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.parametrize("case", [Case(ids=True), Case(candidates="clip", weighted=False)], ids=str)
def test_opcheck(case: Case) -> None:
    torch.use_deterministic_algorithms(False)  # NaN in memory that is not used are no difference
    problem = make_moment_problem(**on_gpu(case.arguments()))
    opcheck(torch.ops.avppc.info_nce_moments_triton, tuple(problem))
    rows, _, *saved = torch.ops.avppc.info_nce_moments_triton(*problem)
    needs = (True, True, case.weighted, True)
    opcheck(torch.ops.avppc.info_nce_moments_triton_backward, (*problem, *saved, torch.rand_like(rows), *needs))


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_memory_stays_far_below_the_logits(candidates: Candidates) -> None:
    """Queries, their gradients, and float32 sums of two parts; all moments with all would take 100 GB."""
    torch.use_deterministic_algorithms(False)
    case = Case(N=512, Tc=26, Tz=26, Dc=128, Dz=128, K=42, candidates=candidates, dtype=BF16)
    arguments = on_gpu(case.arguments())
    inputs = leaves(arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(moment_info_nce(**arguments, backend="triton"), inputs)
    extra = torch.cuda.max_memory_allocated() - before
    queries = case.K * case.N * case.Tc * case.Dz * 2
    parts = 2 * queries + 4 * 2 * case.N * case.Tz * case.Dz if candidates == "both" else 0
    gradients = 2 * sum(value.numel() for value in inputs)
    assert extra < 1.1 * (2 * queries + parts + gradients) + (64 << 20)
