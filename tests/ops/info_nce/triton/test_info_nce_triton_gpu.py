"""The Triton kernels of bilinear_info_nce on a GPU. AVPPC_REQUIRE_GPU=1 makes its absence a failure, not a skip."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_fixtures import capture, nan_filled_memory  # noqa: F401 - a fixture
from info_nce_cases import Case, as_double, assert_as_good_as, leaves, plain_terms, with_gradients
from test_info_nce import OPTIONS, SHAPES, STDS, in_dtypes
from torch import Tensor
from torch.library import opcheck

from avppc import SUBTASKS, PermutativeInfoNCE
from avppc.ops import _library
from avppc.ops.info_nce.op import bilinear_info_nce
from avppc.ops.info_nce.problem import Problem, make_problem
from avppc.ops.info_nce.triton import tiles

MISSING = None if torch.cuda.is_available() else "no CUDA device is available to torch"
if MISSING is None:
    MISSING = _library.triton_missing_reason("cuda", torch.cuda.current_device())
pytestmark = pytest.mark.skipif(
    MISSING is not None and os.environ.get("AVPPC_REQUIRE_GPU") != "1", reason=f"Triton kernels on a GPU: {MISSING}"
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WIDE = [Case(N=1000, extra=24, offset=11, Dc=512, Dz=512), Case(N=300, Dc=1024, Dz=1024, symmetric=True, ids=90)]


@pytest.fixture(params=["recompute", "waves"])
def backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tiles, "recompute_in_backward", lambda *_: request.param == "recompute")
    return request.param


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values on the GPU; leaves stay leaves."""
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    for name, value in leaves(arguments).items():
        moved[name] = value.detach().cuda().requires_grad_()
    return moved


def solve(arguments: dict[str, Any], **options: Any) -> Any:
    return bilinear_info_nce(**arguments, backend="triton", **options)


ALL = in_dtypes([*SHAPES, *OPTIONS, *STDS, *WIDE], F32, BF16)


@pytest.mark.parametrize("case", ALL + in_dtypes([*SHAPES[:4], *OPTIONS[:2], STDS[-1]], F16), ids=str)
def test_it_is_as_good_as_plain_torch(case: Case, backward: str) -> None:
    """Plain torch in the same dtype on the CPU sets the measure; in float32 the GPU must not use tf32."""
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    arguments = case.arguments()
    upstreams = {"none": torch.randn(case.K, case.N, generator=torch.Generator().manual_seed(1))}
    truth = plain_terms(as_double(arguments), upstreams)["none"]
    plain = plain_terms(arguments, upstreams)["none"]
    moved = on_gpu(arguments)
    got = with_gradients(solve(moved, reduction="none"), upstreams["none"].cuda(), moved)
    for name, expected in truth.items():
        assert_as_good_as(got[name].cpu(), plain[name], expected, name, F32 if name == "loss" else case.dtype)


def test_tf32_only_where_torch_allows_it() -> None:
    arguments = on_gpu(Case(N=256, Dc=256, Dz=256, std=16.0).arguments())
    exact = solve(arguments, reduction="none").detach()
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"  # by hand: this is no attribute that could be deleted, as monkeypatch would
    try:
        rough = solve(arguments, reduction="none").detach()
    finally:
        products.fp32_precision = before
    assert 1e-5 < (rough - exact).abs().max() < 1.0


def test_auto_is_triton_and_autocast_is_bfloat16() -> None:
    arguments = on_gpu(Case(N=64).arguments())
    assert torch.equal(bilinear_info_nce(**arguments), solve(arguments))
    with torch.autocast("cuda", BF16):
        loss = bilinear_info_nce(**arguments)
    assert loss.dtype == F32
    assert not torch.equal(loss, solve(arguments))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_two_runs_are_bitwise_equal(dtype: torch.dtype, backward: str) -> None:
    runs = []
    for _ in range(5):
        arguments = on_gpu(Case(K=12, N=600, Dc=128, Dz=128, symmetric=True, dtype=dtype).arguments())
        runs.append(with_gradients(solve(arguments), torch.tensor(0.3, device="cuda"), arguments))
    assert all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in run)


def test_runs_in_a_cuda_graph(backward: str) -> None:
    """A whole step; replayed on other values it gives what an eager step gives on them."""
    loss_fn = PermutativeInfoNCE(64, backend="triton", learn_scale=True).cuda()
    elements = [torch.randn(200, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(4)]
    wanted = [*elements, *loss_fn.parameters()]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", BF16):
            loss = loss_fn(*elements)
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    graph, captured = capture(step)
    with torch.no_grad():
        for element in elements:
            element.normal_()
    graph.replay()
    torch.testing.assert_close(captured, step())


def test_runs_on_the_current_stream() -> None:
    arguments = on_gpu(Case(N=500, Dc=256, Dz=256).arguments())
    expected = solve(arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        later = {**arguments, "contexts": arguments["contexts"] * 1.0}
        got = solve(later)
    stream.synchronize()
    assert torch.equal(got, expected)


CASES = [Case(N=10, Dc=8, Dz=6), Case(N=10, extra=3, offset=1, ids=4), Case(N=10, symmetric=True, weighted=False)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    torch.use_deterministic_algorithms(False)  # NaN in memory that is not used are no difference
    values = make_problem(**on_gpu(case.arguments()))
    problem = Problem(*(x.detach() if isinstance(x, Tensor) else x for x in values))
    opcheck(torch.ops.avppc.info_nce_triton, tuple(problem))
    _, _, *saved = torch.ops.avppc.info_nce_triton(*problem)
    needs = (True, True, case.weighted, True)
    opcheck(torch.ops.avppc.info_nce_triton_backward, (*problem, *saved, torch.rand(3, 10, device="cuda"), *needs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch itself
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    arguments = on_gpu(Case(N=100, Dc=64, Dz=64).arguments())

    def step(contexts: Tensor, targets: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        loss: Tensor = bilinear_info_nce(2 * contexts, targets, weights, arguments["pairs"], scale=scale)
        return loss

    wanted = list(leaves(arguments).values())
    expected = torch.autograd.grad(step(*wanted), wanted)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*wanted), wanted)
    torch.testing.assert_close(got, expected)


def chunked_gradients(arguments: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """Mean loss and gradients by plain torch in float32, so many rows of a sub-task at a time."""
    wanted = leaves(arguments)
    total, K, N = torch.zeros((), device="cuda"), len(arguments["pairs"]), arguments["contexts"].shape[1]
    sums = {name: torch.zeros_like(value, dtype=F32) for name, value in wanted.items()}
    floats = {name: value.detach().float().requires_grad_() for name, value in wanted.items()}
    for k, (context, target) in enumerate(arguments["pairs"]):
        for first in range(0, N, rows):
            q = floats["contexts"][context, first : first + rows]
            q = q if arguments["weights"] is None else q @ floats["weights"][k].T
            s = floats["scale"] * q @ floats["targets"][target].T
            labels = torch.arange(first, first + len(s), device="cuda")
            loss = F.cross_entropy(s, labels, reduction="sum") / (K * N)
            total += loss.detach()
            for name, gradient in zip(floats, torch.autograd.grad(loss, list(floats.values())), strict=True):
                sums[name] += gradient
    return {"loss": total, **sums}


@pytest.mark.parametrize(
    "case",
    [Case(K=42, N=8192, Dc=64, Dz=64, dtype=BF16), Case(K=1, N=65536, Dc=64, Dz=64, dtype=BF16)],
    ids=str,
)
def test_more_logits_than_int32_counts(case: Case, backward: str) -> None:
    assert case.K * case.N**2 > 2**31
    torch.use_deterministic_algorithms(False)
    arguments = on_gpu(dataclasses.replace(case).arguments())
    got = with_gradients(solve(arguments), torch.tensor(1.0, device="cuda"), arguments)
    for name, expected in chunked_gradients(arguments, 2048).items():
        deviation = torch.linalg.vector_norm(got[name].float() - expected) / torch.linalg.vector_norm(expected)
        assert deviation < (1e-3 if name == "loss" else 2e-2), name


def test_memory_stays_far_below_the_logits() -> None:
    """At N = 4096 and D = 512: queries, their gradients, float32 sums of dz and the workspace, and nothing else."""
    torch.use_deterministic_algorithms(False)
    sets = sorted({side for task in SUBTASKS for side in (task.inputs, task.targets)})
    pairs = [(sets.index(task.inputs), sets.index(task.targets)) for task in SUBTASKS]
    K, N, D = 42, 4096, 512
    contexts, targets = (torch.randn(10, N, D, device="cuda", dtype=BF16, requires_grad=True) for _ in range(2))
    weights = (torch.randn(K, D, D, device="cuda", dtype=BF16) / D).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bilinear_info_nce(contexts, targets, weights, pairs).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (contexts.numel() + targets.numel() + weights.numel())
    wave = max(limits.wave_bytes for limits in tiles.BACKWARD.values())
    expected = 2 * 2 * K * N * D + 4 * targets.numel() + wave + gradients
    assert extra < 1.1 * expected + (64 << 20)
    assert extra < 2 * K * N * N / 2  # half of the logits in bfloat16
